/* Tries the kernels on random matrices, without Python: test_kernels_sanitized.py compiles it with sanitizers.
 *
 *     kernels_driver products FIRST COUNT    one small matrix for each seed, against sums of doubles
 *     kernels_driver threads ROUNDS          matrices large enough to be shared out, computed by several threads at once
 *     kernels_driver pool ROUNDS             the threads alone: every chunk is worked on once, by whom it may
 *     kernels_driver choose ROUNDS           kernels are chosen anew while others compute
 *
 * Matrices are packed here a second time, from docs/formats.md. All buffers end where their data ends. */
#include "kernels.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

const char *secateur_use(const char *name);
void secateur_borrow_threads(void *gomp_parallel);
int secateur_linear(const Matrix *w, const uint8_t *x, int x_type, int64_t batch, uint8_t *y, int y_type,
                    const float *bias, int activations8, int threads);
int secateur_unpack(const Matrix *w, int64_t first, int64_t end, uint8_t *out, int out_type, int unscaled, int threads);

static const char *const NAMES[] = {"portable", "avx2", "avx512"};
static const double UNIT = 1.0 / (1 << 24); /* of rounding, in float32 */
static uint64_t seed_now;

static _Noreturn void fail(const char *what, double found, double wanted) {
    fprintf(stderr, "seed %llu: %s: %.9g instead of %.9g\n", (unsigned long long)seed_now, what, found, wanted);
    exit(1);
}

/* Chance. */

static uint64_t next(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}
static int64_t below(uint64_t *state, int64_t limit) { return (int64_t)(next(state) % (uint64_t)limit); }
static int64_t between(uint64_t *state, int64_t a, int64_t b) { return a + below(state, b - a + 1); }

/* Numbers as bits, and their meaning. */

static double decode(uint32_t bits, int type) {
    if (type == I8) return (int8_t)bits;
    if (type != F16) return as_float(type == BF16 ? bits << 16 : bits);
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

static uint32_t read_bits(const uint8_t *p, int type) {
    return type == F32 ? load32(p) : type == I8 ? *p : load16(p);
}

static void write_bits(uint8_t *p, int type, uint32_t bits) { memcpy(p, &bits, (size_t)SIZE[type]); }

static uint32_t any_number(uint64_t *state, int type) { /* finite; of sizes that differ, but do not overflow in sums */
    uint32_t sign = (uint32_t)below(state, 2), odd = (uint32_t)next(state);
    if (type == I8) return (uint32_t)(uint8_t)between(state, -128, 127);
    if (below(state, 16) == 0) return 0;
    if (type == F16) return sign << 15 | (uint32_t)between(state, 0, 20) << 10 | (odd & 1023);
    uint32_t exponent = (uint32_t)between(state, 117, 132);
    return type == BF16 ? sign << 15 | exponent << 7 | (odd & 127) : sign << 31 | exponent << 23 | (odd & 0x7fffff);
}

/* Memory that ends with its last byte, and begins at any address. */

typedef struct {
    uint8_t *whole, *data;
} Buffer;

static Buffer buffer(uint64_t *state, int64_t bytes, int odd) {
    int64_t room = odd ? below(state, 4) : 0;
    uint8_t *whole = bytes ? calloc(1, (size_t)(bytes + room)) : NULL;
    return (Buffer){whole, whole ? whole + room : NULL};
}

/* A matrix, packed and as doubles. */

typedef struct {
    Matrix w;
    double *weights; /* [rows, columns], with their scales */
    double *plain;   /* [rows, columns], without */
    Buffer values, where, scale;
    int64_t *offsets;
    int64_t count;
} Case;

typedef struct {
    double density;
    int by_rows; /* whole rows of a tile's block are full or empty */
} Zeros;

static int kept(uint64_t *state, const Zeros *zeros) {
    return (double)(next(state) >> 11) / (double)(1ull << 53) < zeros->density;
}

/* Give a weight its number. */
static void put(Case *c, int64_t row, int64_t column, uint32_t bits) {
    write_bits(c->values.data + c->count++ * SIZE[c->w.type], c->w.type, bits);
    if (row < c->w.rows && column < c->w.columns) c->plain[row * c->w.columns + column] = decode(bits, c->w.type);
}

static void fill_dense(Case *c, uint64_t *state, const Zeros *zeros) {
    for (int64_t row = 0; row < c->w.rows; row++)
        for (int64_t column = 0; column < c->w.columns; column++)
            put(c, row, column, kept(state, zeros) ? any_number(state, c->w.type) : 0);
}

static void fill_bitmask(Case *c, uint64_t *state, const Zeros *zeros) {
    int64_t bit = 0;
    for (int64_t top = 0; top < c->w.rows; top += 4, c->offsets[top / 4] = c->count)
        for (int64_t left = 0; left < c->w.columns; left += 64)
            for (int64_t row = top; row < top + 4; row++) {
                int all = zeros->by_rows ? (int)below(state, 3) : 2;
                for (int64_t column = left; column < left + 64; column++, bit++) {
                    if (row >= c->w.rows || column >= c->w.columns || !(all < 2 ? all : kept(state, zeros))) continue;
                    c->where.data[bit / 8] |= (uint8_t)(1 << bit % 8);
                    put(c, row, column, any_number(state, c->w.type));
                }
            }
}

static void fill_nm(Case *c, uint64_t *state, const Zeros *zeros) {
    int n = c->w.n, m = c->w.m, wide = 16 / m * m, bits = m == 2 ? 1 : m <= 4 ? 2 : 4;
    int64_t bit = 0;
    for (int64_t top = 0; top < c->w.rows; top += 4, c->offsets[top / 4] = c->count)
        for (int64_t left = 0; left < c->w.columns; left += wide)
            for (int64_t row = top; row < top + 4; row++)
                for (int64_t first = left; first < left + wide; first += m)
                    for (int place = 0, needed = n; place < m; place++) {
                        if (below(state, m - place) >= needed) continue;
                        needed--;
                        put(c, row, first + place, kept(state, zeros) ? any_number(state, c->w.type) : 0); /* or padding */
                        c->where.data[bit / 8] |= (uint8_t)(place << bit % 8);
                        bit += bits;
                    }
}

static Case make(uint64_t *state, int format, int type, int64_t rows, int64_t columns, int odd) {
    static const double DENSITIES[] = {0, 0.02, 0.3, 0.5, 0.9, 1};
    Zeros zeros = {DENSITIES[below(state, 6)], below(state, 4) == 0};
    int m = (int)between(state, 2, 16), n = (int)between(state, 1, m - 1), groups = 16 / m;
    int64_t tiles = (rows + 3) / 4, steps = (columns + groups * m - 1) / (groups * m);
    int64_t most = tiles * 4 * steps * groups * n, where = (most * (m == 2 ? 1 : m <= 4 ? 2 : 4) + 7) / 8;
    if (format != NM) most = rows * columns, where = format == BITMASK ? tiles * ((columns + 63) / 64) * 32 : 0, n = m = 0;
    Case c = {.w = {format, type, rows, columns, n, m, NULL, NULL, NULL, NULL, 0}};
    c.weights = calloc((size_t)(rows * columns), sizeof(double));
    c.plain = calloc((size_t)(rows * columns), sizeof(double));
    c.values = buffer(state, most * SIZE[type], 0);
    c.where = buffer(state, where, odd);
    c.scale = buffer(state, rows * 4, odd);
    c.offsets = calloc((size_t)(tiles + 1), sizeof(int64_t));
    if (format == DENSE) fill_dense(&c, state, &zeros);
    else if (format == BITMASK) fill_bitmask(&c, state, &zeros);
    else fill_nm(&c, state, &zeros);
    Buffer exact = buffer(state, c.count * SIZE[type], odd);
    if (c.count) memcpy(exact.data, c.values.data, (size_t)(c.count * SIZE[type]));
    free(c.values.whole);
    c.values = exact;
    for (int64_t row = 0; row < rows; row++) {
        float scale = type == I8 ? (float)between(state, 1, 1000) / 3000 : 1;
        memcpy(c.scale.data + 4 * row, &scale, 4);
        for (int64_t k = row * columns; k < (row + 1) * columns; k++) c.weights[k] = c.plain[k] * scale;
    }
    c.w.values = exact.data, c.w.where = format == DENSE ? NULL : c.where.data, c.w.count = c.count;
    c.w.offsets = format == DENSE ? NULL : c.offsets;
    c.w.scale = type == I8 ? (const float *)(const void *)c.scale.data : NULL;
    return c;
}

static void forget(Case *c) {
    free(c->weights), free(c->plain), free(c->values.whole), free(c->where.whole), free(c->scale.whole);
    free(c->offsets);
}

/* What has to come out. */

static int64_t slot_of(const Matrix *w, int64_t column) {
    int wide = w->format == NM ? 16 / w->m * w->m : 16;
    return column / wide * 16 + column % wide;
}

/* Inputs rounded to 8 bits, and the scale of each block of 64 slots. */
static void rounded_inputs(const Matrix *w, const double *x, double *whole, double *scales) {
    int64_t blocks = slot_of(w, w->columns - 1) / 64 + 1;
    for (int64_t i = 0; i < blocks; i++) scales[i] = 0;
    for (int64_t k = 0; k < w->columns; k++) scales[slot_of(w, k) / 64] = fmax(scales[slot_of(w, k) / 64], fabs(x[k]));
    for (int64_t k = 0; k < w->columns; k++) {
        float most = (float)scales[slot_of(w, k) / 64];
        whole[k] = most > 0 ? nearbyintf((float)x[k] * (127 / most)) : 0;
    }
    for (int64_t i = 0; i < blocks; i++) scales[i] = (float)scales[i] / 127;
}

/* Compare y with one row of W times x; sums of whole numbers are exact. */
static void compare(const Case *c, int64_t row, const double *x, const float *bias, int activations8, double y,
                    int y_type) {
    int64_t columns = c->w.columns;
    double sum = 0, sizes = 0, *whole = malloc((size_t)columns * 2 * sizeof *whole), *scales = whole + columns;
    if (activations8) rounded_inputs(&c->w, x, whole, scales);
    for (int64_t k = 0; k < columns; k++) {
        double product = c->weights[row * columns + k];
        product *= activations8 ? whole[k] * scales[slot_of(&c->w, k) / 64] : x[k];
        sum += product, sizes += fabs(product);
    }
    free(whole);
    if (bias) sum += bias[row], sizes += fabs(bias[row]);
    double allowed = sizes * UNIT * ((double)columns / 2 + 16) + 1e-35; /* steps of 16 may hold as few as 9 columns */
    if (y_type == BF16) allowed += (fabs(sum) + allowed) / 256;
    if (y_type == F16) allowed += (fabs(sum) + allowed) / 2048 + ldexp(1, -25);
    if (y_type == F16 && fabs(sum) + allowed > 65504) return;
    if (!(fabs(y - sum) <= allowed)) fail("y", y, sum);
}

static void try_linear(const Case *c, uint64_t *state, int64_t batch, int threads) {
    int x_type = (int)below(state, 3), y_type = below(state, 2) ? x_type : F32;
    int may8 = c->w.type == I8 && c->w.format != BITMASK, activations8 = may8 && below(state, 2);
    int64_t rows = c->w.rows, columns = c->w.columns;
    Buffer x = buffer(state, batch * columns * SIZE[x_type], 1), y = buffer(state, batch * rows * SIZE[y_type], 0);
    Buffer bias = buffer(state, below(state, 2) ? rows * 4 : 0, 1);
    for (int64_t k = 0; k < batch * columns; k++) write_bits(x.data + k * SIZE[x_type], x_type, any_number(state, x_type));
    if (bias.data) for (int64_t k = 0; k < rows; k++) write_bits(bias.data + 4 * k, F32, any_number(state, F32));
    float *biases = calloc((size_t)rows, sizeof(float));
    if (bias.data) memcpy(biases, bias.data, (size_t)rows * 4);
    if (secateur_linear(&c->w, x.data, x_type, batch, y.data, y_type, (const float *)(const void *)bias.data, activations8,
                        threads))
        fail("refused", 1, 0);
    double *row_of_x = malloc((size_t)columns * sizeof(double));
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t k = 0; k < columns; k++)
            row_of_x[k] = decode(read_bits(x.data + (b * columns + k) * SIZE[x_type], x_type), x_type);
        for (int64_t row = 0; row < rows; row++)
            compare(c, row, row_of_x, bias.data ? biases : NULL, activations8,
                    decode(read_bits(y.data + (b * rows + row) * SIZE[y_type], y_type), y_type), y_type);
    }
    free(row_of_x), free(biases), free(x.whole), free(y.whole), free(bias.whole);
}

static void try_unpack(const Case *c, uint64_t *state, int threads) {
    int type = (int)below(state, 3);
    int64_t rows = c->w.rows, columns = c->w.columns, tiles = (rows + 3) / 4;
    int64_t first = 4 * below(state, tiles), end = 4 * between(state, first / 4, tiles);
    if (end > rows) end = rows;
    Buffer out = buffer(state, (end - first) * columns * SIZE[type], 0);
    int unscaled = below(state, 2), code = secateur_unpack(&c->w, first, end, out.data, type, unscaled, threads);
    if (code) fail("unpack refused", code, 0);
    for (int64_t k = 0; k < (end - first) * columns; k++) {
        double found = decode(read_bits(out.data + k * SIZE[type], type), type);
        double wanted = c->plain[first * columns + k], allowed = 0;
        if (c->w.type == I8 && !unscaled) wanted = (float)wanted * as_float(load32(c->scale.data + (first + k / columns) * 4));
        if (type == BF16) allowed = fabs(wanted) / 256;
        if (type == F16) allowed = fabs(wanted) / 2048 + ldexp(1, -25);
        if (!(fabs(found - wanted) <= allowed)) fail("unpacked", found, wanted);
    }
    free(out.whole);
}

static int64_t any_size(uint64_t *state, int64_t most) {
    static const int64_t EDGES[] = {1, 4, 15, 16, 17, 63, 64, 65, 128, 129};
    int64_t edge = EDGES[below(state, 10)];
    return below(state, 2) && edge <= most ? edge : between(state, 1, below(state, 2) ? most : most / 8);
}

static void products(uint64_t first, uint64_t count) {
    for (seed_now = first; seed_now < first + count; seed_now++)
        for (int i = 0; i < 3; i++) {
            uint64_t state = seed_now;
            if (!secateur_use(NAMES[i])) continue;
            int format = (int)below(&state, 3), type = (int)below(&state, 4);
            Case c = make(&state, format, type, any_size(&state, 48), any_size(&state, 400), 1);
            int threads = (int)between(&state, 0, 5);
            try_linear(&c, &state, 1, threads);
            try_linear(&c, &state, between(&state, 2, 18), threads);
            try_unpack(&c, &state, threads);
            forget(&c);
        }
}

/* Threads. */

typedef struct {
    uint64_t seed;
    int rounds;
} Caller;

static void *compute(void *argument) {
    Caller *caller = argument;
    uint64_t state = caller->seed;
    for (int round = 0; round < caller->rounds; round++) {
        int format = (int)below(&state, 3), type = (int)below(&state, 4);
        int64_t rows = between(&state, 500, 700), columns = 2300000 / rows / SIZE[type];
        Case c = make(&state, format, type, rows, columns, 1);
        int64_t batch = between(&state, 1, 2);
        size_t outputs = (size_t)(batch * rows) * 4;
        float *x = calloc((size_t)(batch * columns), 4), *y = malloc(outputs), *again = malloc(outputs);
        double *row_of_x = malloc((size_t)columns * sizeof *row_of_x);
        for (int64_t k = 0; k < batch * columns; k++) x[k] = (float)decode(any_number(&state, F32), F32);
        for (int64_t k = 0; k < columns; k++) row_of_x[k] = x[k];
        secateur_linear(&c.w, (uint8_t *)x, F32, batch, (uint8_t *)y, F32, NULL, 0, 1);
        for (int64_t k = 0; k < 8; k++) /* a few of many */
            compare(&c, k * rows / 8, row_of_x, NULL, 0, y[k * rows / 8], F32);
        for (int threads = 2; threads < 5; threads += 2) {
            secateur_linear(&c.w, (uint8_t *)x, F32, batch, (uint8_t *)again, F32, NULL, 0, threads);
            if (memcmp(y, again, outputs)) fail("bits differ with threads", threads, 1);
        }
        try_unpack(&c, &state, 4);
        free(x), free(y), free(again), free(row_of_x), forget(&c);
    }
    return NULL;
}

enum { MOST_CHUNKS = 40 };
typedef struct {
    int hits[MOST_CHUNKS]; /* not atomic: whoever takes a chunk has it alone */
    int slow;
} Chunks;

static void hit(void *context, int64_t chunk) {
    Chunks *chunks = context;
    chunks->hits[chunk]++;
    if (chunks->slow && chunk % 7 == 0) usleep(50);
}

static void *share_out(void *argument) {
    Caller *caller = argument;
    uint64_t state = caller->seed;
    for (int round = 0; round < caller->rounds; round++) {
        Chunks chunks = {.slow = below(&state, 20) == 0};
        int64_t count = below(&state, MOST_CHUNKS + 1);
        secateur_parallel(hit, &chunks, count, (int)between(&state, -1, 6));
        for (int64_t chunk = 0; chunk < MOST_CHUNKS; chunk++)
            if (chunks.hits[chunk] != (chunk < count)) fail("visits of a chunk", chunks.hits[chunk], chunk < count);
        if (below(&state, 30) == 0) usleep(100); /* so that threads fall asleep */
    }
    return NULL;
}

/* What GOMP_parallel does. */
typedef struct {
    void (*work)(void *);
    void *context;
} Start;
static void *start(void *argument) {
    Start *s = argument;
    s->work(s->context);
    return NULL;
}
static void imitated_parallel(void (*work)(void *), void *context, unsigned threads, unsigned flags) {
    pthread_t others[64];
    Start s = {work, context};
    (void)flags;
    for (unsigned i = 1; i < threads; i++) pthread_create(&others[i], NULL, start, &s);
    work(context);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
}

static void together(void *(*what)(void *), int rounds) {
    pthread_t others[3];
    Caller callers[3];
    for (int i = 0; i < 3; i++) {
        callers[i] = (Caller){(uint64_t)i + 1, rounds};
        pthread_create(&others[i], NULL, what, &callers[i]);
    }
    for (int i = 0; i < 3; i++) pthread_join(others[i], NULL);
}

static atomic_int done;
static void *choose(void *unused) {
    (void)unused;
    while (!atomic_load(&done)) secateur_use(NULL);
    return NULL;
}

int main(int count, char **arguments) {
    const char *mode = count > 1 ? arguments[1] : "";
    int rounds = count > 2 ? atoi(arguments[2]) : 1;
    Caller alone = {9, rounds};
    secateur_borrow_threads(NULL);
    secateur_use(NULL);
    if (!strcmp(mode, "products") && count > 3) products(strtoull(arguments[2], NULL, 10), strtoull(arguments[3], NULL, 10));
    else if (!strcmp(mode, "threads")) compute(&alone), together(compute, rounds);
    else if (!strcmp(mode, "pool")) {
        share_out(&alone), together(share_out, rounds);
        secateur_borrow_threads((void *)imitated_parallel);
        alone.rounds = rounds / 10, share_out(&alone);
    } else if (!strcmp(mode, "choose")) {
        pthread_t chooser;
        pthread_create(&chooser, NULL, choose, NULL);
        seed_now = 1;
        for (int i = 0; i < rounds; i++) {
            uint64_t state = (uint64_t)i;
            Case c = make(&state, i % 3, i / 3 % 4, 40, 300, 1);
            try_linear(&c, &state, 1, 1), try_linear(&c, &state, 3, 1), try_unpack(&c, &state, 1);
            forget(&c);
        }
        atomic_store(&done, 1);
        pthread_join(chooser, NULL);
    } else return fprintf(stderr, "usage: see the top of the source\n"), 2;
    printf("ok\n");
    return 0;
}
