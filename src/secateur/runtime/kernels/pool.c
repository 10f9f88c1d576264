/* Threads that share out the chunks of a job.
 *
 * Chunks are taken from a counter, so a thread that the system has stopped costs one chunk and not its whole share.
 *
 * Where torch runs on OpenMP, its threads are borrowed: they stay awake for a while after each of torch's own jobs, and
 * threads beside them would fight them for processors. Elsewhere, and in a forked child, where OpenMP's are lost, there
 * are threads of our own, for one job at a time: the caller works too, and waits only for threads that have begun; a
 * caller that finds them in use works alone. */
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST_THREADS = 64 };
static const int64_t PATIENCE_NS = 50000; /* that an idle thread stays awake */
static const uint64_t OPEN = 1ull << 32;    /* of `state`; below it, how many threads are in the job */

typedef struct {
    void (*work)(void *, int64_t);
    void *context;
    int64_t chunks;
    _Atomic int64_t next;
} Shared;

static void take_chunks(void *shared) {
    Shared *job = shared;
    int64_t chunk;
    while ((chunk = atomic_fetch_add(&job->next, 1)) < job->chunks) job->work(job->context, chunk);
}

static struct {
    Shared *job;
    _Atomic uint64_t state;
    _Atomic int asleep, seats; /* seats: threads that may still join the job */
    int started;
    pthread_mutex_t in_use, sleep;
    pthread_cond_t wake;
} pool = {.in_use = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

typedef void (*Fork)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, OpenMP's own entry */
static Fork borrowed;

/* Become one of the job's threads, if it is open and has a seat. */
static int enter(void) {
    uint64_t state = atomic_load(&pool.state);
    while (state & OPEN)
        if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) {
            if (atomic_fetch_sub(&pool.seats, 1) > 0) return 1;
            atomic_fetch_add(&pool.seats, 1);
            atomic_fetch_sub(&pool.state, 1);
            return 0;
        }
    return 0;
}

static void wait_for_job(void) {
    int64_t until = now_ns() + PATIENCE_NS;
    do
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&pool.state, memory_order_relaxed) & OPEN) return;
            pause_briefly();
        }
    while (now_ns() < until);
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.asleep, 1);
    while (!(atomic_load(&pool.state) & OPEN)) pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.sleep);
}

static void *worker(void *unused) {
    (void)unused;
    for (;;) {
        wait_for_job();
        if (enter()) {
            take_chunks(pool.job);
            atomic_fetch_sub(&pool.state, 1);
        }
        while (atomic_load_explicit(&pool.state, memory_order_relaxed) & OPEN) pause_briefly(); /* the job's last chunks */
    }
    return NULL;
}

static void forget_threads(void) { /* a child process has none of them */
    borrowed = NULL;
    pool.started = 0;
    atomic_store(&pool.state, 0);
    atomic_store(&pool.asleep, 0);
    pthread_mutex_init(&pool.in_use, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

/* Borrow OpenMP's threads, given its GOMP_parallel or NULL. Called once, before anything else. */
EXPORT void secateur_borrow_threads(void *gomp_parallel) {
    if (pthread_atfork(NULL, NULL, forget_threads) == 0) borrowed = (Fork)gomp_parallel;
}

static void start_threads(int wanted) {
    while (pool.started < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL)) return; /* fewer will do */
        pthread_detach(thread);
        pool.started++;
    }
}

void secateur_parallel(void (*work)(void *context, int64_t chunk), void *context, int64_t chunks, int threads) {
    Shared job = {work, context, chunks, 0};
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > chunks) threads = (int)chunks;
    if (threads > 1 && borrowed) {
        borrowed(take_chunks, &job, (unsigned)threads, 0);
        return;
    }
    if (threads <= 1 || pthread_mutex_trylock(&pool.in_use)) {
        take_chunks(&job);
        return;
    }
    start_threads(threads - 1);
    pool.job = &job;
    atomic_store(&pool.seats, threads - 1);
    atomic_store(&pool.state, OPEN);
    if (atomic_load(&pool.asleep)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    take_chunks(&job);
    atomic_fetch_and(&pool.state, ~OPEN);
    for (int spins = 0; atomic_load(&pool.state); spins++) spins < 4096 ? pause_briefly() : (void)sched_yield();
    pthread_mutex_unlock(&pool.in_use);
}
