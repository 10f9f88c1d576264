/* What Python calls: y = x Wᵀ + b from a packed W, and rows of W unpacked. Chooses the kernels, prepares x, shares out
 * row tiles among threads, and casts the result. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

enum { DONE, NO_MEMORY, NO_SUCH_KERNEL };
static const int64_t THREAD_BYTES = 1 << 20; /* of weights to multiply: less is not worth another thread's while */
static const int64_t CHUNK_BYTES = 1 << 15;

static const Kernels *kernels;

/* Use the widest vectors that this machine has, or those named. Returns the name in use, or NULL if there are none such. */
EXPORT const char *secateur_use(const char *name) {
    const Kernels *(*const all[])(void) = {secateur_avx512, secateur_avx2, secateur_portable};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const Kernels *found = all[i]();
        if (found && (!name || !strcmp(name, found->name))) {
            if (kernels != found) kernels = found; /* others may be reading it */
            return found->name;
        }
    }
    return NULL;
}

static uint16_t float_to_bf16(float f) {
    uint32_t u = as_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static uint16_t float_to_half(float f) {
    uint32_t u = as_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000) return (uint16_t)(sign | (as_bits(as_float(u) + 0.5f) - 0x3f000000)); /* subnormal */
    return (uint16_t)(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

EXPORT const char *secateur_used(void) { return kernels->name; }

/* Whether the processor has instructions for products of bfloat16. */
EXPORT int secateur_native_bfloat16(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

static void write_values(uint8_t *p, int type, const float *values, int64_t count) {
    for (int64_t i = 0; type == BF16 && i < count; i++) ((uint16_t *)p)[i] = float_to_bf16(values[i]);
    for (int64_t i = 0; type == F16 && i < count; i++) ((uint16_t *)p)[i] = float_to_half(values[i]);
    if (type == F32) memcpy(p, values, (size_t)count * 4);
}

static void read_values(const uint8_t *p, int type, float *values, int64_t count) {
    for (int64_t i = 0; type == BF16 && i < count; i++) values[i] = value_at(p + 2 * i, BF16);
    for (int64_t i = 0; type == F16 && i < count; i++) values[i] = value_at(p + 2 * i, F16);
    if (type == F32) memcpy(values, p, (size_t)count * 4);
}

/* One row of x as float32 slots. */
static void to_slots(const Matrix *w, const uint8_t *x, int type, float *slots, int64_t count) {
    int64_t wide = step_columns(w), all = w->columns;
    memset(slots, 0, (size_t)count * sizeof *slots);
    if (wide == STEP) wide = all;
    for (int64_t column = 0; column < all; column += wide, slots += STEP)
        read_values(x + column * SIZE[type], type, slots, all - column < wide ? all - column : wide);
}

/* A block of 64 slots gets one scale: its largest magnitude over 127. What is not finite makes the block's scale NaN. */
static void to_8_bit(const float *slots, int64_t count, int8_t *out, float *scales) {
    for (int64_t i = 0; i < count / BLOCK; i++, slots += BLOCK, out += BLOCK) {
        float most = 0;
        int finite = 1;
        for (int j = 0; j < BLOCK; j++) {
            float size = fabsf(slots[j]);
            finite &= size <= 3.4028234e38f;
            most = size > most ? size : most;
        }
        float factor = most > 4e-37f ? 127 / most : 0; /* what is smaller is as good as zero, and 127 / it may be infinite */
        for (int j = 0; j < BLOCK; j++) out[j] = finite ? (int8_t)lrintf(slots[j] * factor) : 0;
        scales[i] = finite ? most / 127 : NAN;
    }
}

static int all_finite(const float *slots, int64_t count) {
    int finite = 1;
    for (int64_t i = 0; i < count; i++) finite &= (as_bits(slots[i]) & 0x7f800000) != 0x7f800000;
    return finite;
}

typedef struct {
    const Matrix *w;
    const Kernels *kernels;
    const float *x;
    const int8_t *x8;
    const float *x_scale;
    int64_t slots;
    int batch;
    float *sums; /* [batch, ldy] */
    int64_t ldy;
    uint8_t *out;
    int out_type;
    const float *bias;
    int64_t first, end, tiles_of_chunk; /* in tiles */
    int unscaled;
    volatile int failed;
} Job;

static int safe(const Matrix *w, int64_t tile) { /* OVERREAD bytes follow it */
    int64_t after = tiles_of(w) - tile - 1;
    return w->format == DENSE || ((w->count - w->offsets[tile + 1]) * SIZE[w->type] >= OVERREAD &&
                                  after * where_bytes(w) >= OVERREAD);
}

/* One tile as a matrix of its own, with room behind it. The caller frees what is returned. */
static uint8_t *with_room(const Matrix *w, int64_t tile, Matrix *alone, int64_t offsets[2]) {
    int64_t from = w->offsets[tile] * SIZE[w->type], values = w->offsets[tile + 1] * SIZE[w->type] - from;
    int64_t where = where_bytes(w);
    uint8_t *copy = calloc(1, (size_t)(values + where + 2 * OVERREAD));
    if (!copy) return NULL;
    if (values) memcpy(copy, w->values + from, (size_t)values); /* where there are none, the pointer may be NULL */
    memcpy(copy + values + OVERREAD, w->where + tile * where, (size_t)where);
    *alone = *w;
    offsets[0] = 0, offsets[1] = values / SIZE[w->type];
    alone->offsets = offsets, alone->values = copy, alone->where = copy + values + OVERREAD, alone->count = offsets[1];
    alone->rows = w->rows - tile * TILE < TILE ? w->rows - tile * TILE : TILE;
    return copy;
}

static void sum_tiles(const Job *job, const Matrix *w, int64_t begin, int64_t end, int64_t row) {
    for (int b = 0; b < (job->x8 ? job->batch : 0); b++)
        job->kernels->rows8[w->format](w, job->x8 + b * job->slots, job->x_scale + b * job->slots / BLOCK, job->slots,
                                       job->sums + b * job->ldy + row, begin, end);
    if (!job->x8)
        job->kernels->rows[w->format][w->type](w, job->x, job->slots, job->batch, job->sums + row, job->ldy, begin, end);
}

static void linear_chunk(void *context, int64_t chunk) {
    Job *job = context;
    const Matrix *w = job->w;
    int64_t begin = chunk * job->tiles_of_chunk, end = begin + job->tiles_of_chunk, tile;
    if (end > job->end) end = job->end;
    for (tile = end; tile > begin && !safe(w, tile - 1);) tile--;
    if (tile > begin) sum_tiles(job, w, begin, tile, 0);
    for (; tile < end; tile++) {
        Matrix alone;
        int64_t offsets[2];
        uint8_t *copy = with_room(w, tile, &alone, offsets);
        if (copy) sum_tiles(job, &alone, 0, 1, tile * TILE);
        else job->failed = 1;
        free(copy);
    }
    int64_t last = end * TILE < w->rows ? end * TILE : w->rows, first = begin * TILE;
    for (int b = 0; b < job->batch; b++) {
        float *sums = job->sums + b * job->ldy;
        for (int64_t row = first; w->type == I8 && row < last; row++) sums[row] *= float_at(w->scale, row);
        for (int64_t row = first; job->bias && row < last; row++) sums[row] += float_at(job->bias, row);
        write_values(job->out + (b * w->rows + first) * SIZE[job->out_type], job->out_type, sums + first, last - first);
    }
}

static int64_t bytes_of(const Matrix *w) {
    if (w->format == DENSE) return w->rows * w->columns * SIZE[w->type];
    return w->count * SIZE[w->type] + tiles_of(w) * where_bytes(w);
}

static void share(void (*work)(void *, int64_t), Job *job, int threads, int64_t thread_bytes) {
    int64_t tiles = job->end - job->first, bytes = bytes_of(job->w) * tiles / (tiles_of(job->w) + !tiles_of(job->w));
    int64_t chunks = bytes / CHUNK_BYTES < 1 ? 1 : bytes / CHUNK_BYTES;
    job->tiles_of_chunk = ceil_div(tiles, chunks) + !tiles;
    if (threads > bytes / thread_bytes) threads = (int)(bytes / thread_bytes);
    secateur_parallel(work, job, ceil_div(tiles, job->tiles_of_chunk), threads);
}

/* y = x Wᵀ + bias. x [batch, columns] and y [batch, rows] are contiguous, in float32, bfloat16 or float16; sums are kept in
 * float32. With `activations8`, x is rounded to 8 bits, one scale for each 64 slots; values must be 8-bit and not `bitmask`. */
EXPORT int secateur_linear(const Matrix *w, const uint8_t *x, int x_type, int64_t batch, uint8_t *y, int y_type,
                           const float *bias, int activations8, int threads) {
    if (activations8 && (w->type != I8 || !kernels->rows8[w->format])) return NO_SUCH_KERNEL;
    if (batch == 0 || w->rows == 0) return DONE;
    int64_t slots = blocks_of(w) * BLOCK, ldy = tiles_of(w) * TILE, most = batch < MAX_BATCH ? batch : MAX_BATCH;
    float *scratch = malloc((size_t)(most * (slots + ldy + slots / BLOCK)) * sizeof(float) + (size_t)(most * slots));
    if (!scratch) return NO_MEMORY;
    float *sums = scratch + most * slots, *scales = sums + most * ldy;
    int8_t *x8 = (int8_t *)(scales + most * (slots / BLOCK));
    int failed = 0;
    for (int64_t first = 0; first < batch && !failed; first += most) {
        int rows = (int)(batch - first < most ? batch - first : most);
        for (int b = 0; b < rows; b++) {
            to_slots(w, x + (first + b) * w->columns * SIZE[x_type], x_type, scratch + b * slots, slots);
            if (activations8) to_8_bit(scratch + b * slots, slots, x8 + b * slots, scales + b * (slots / BLOCK));
        }
        /* Kernels that pick inputs would pass over a NaN or Inf at a place that holds no value; 0 x NaN is NaN. */
        const Kernels *those = w->format != NM || all_finite(scratch, rows * slots) ? kernels : secateur_portable();
        Job job = {.w = w, .kernels = those, .x = scratch, .x8 = activations8 ? x8 : NULL, .x_scale = scales,
                   .slots = slots, .batch = rows, .sums = sums, .ldy = ldy, .out = y + first * w->rows * SIZE[y_type],
                   .out_type = y_type, .bias = bias, .end = tiles_of(w)};
        share(linear_chunk, &job, threads, THREAD_BYTES);
        failed = job.failed;
    }
    free(scratch);
    return failed ? NO_MEMORY : DONE;
}

static void unpack_chunk(void *context, int64_t chunk) {
    Job *job = context;
    const Matrix *w = job->w;
    int64_t begin = job->first + chunk * job->tiles_of_chunk, end = begin + job->tiles_of_chunk;
    int64_t columns = w->columns, size = SIZE[job->out_type];
    int scaled = w->type == I8 && !job->unscaled;
    int raw16 = SIZE[w->type] == 2 && job->out_type == w->type, direct = raw16 || (job->out_type == F32 && !scaled);
    Unpack unpack = raw16 ? kernels->unpack16[w->format] : kernels->unpack[w->format][w->type];
    float *rows = malloc((size_t)(TILE * columns + !columns) * sizeof(float));
    for (int64_t tile = begin; rows && tile < end && tile < job->end; tile++) {
        Matrix alone;
        int64_t offsets[2], count = w->rows - tile * TILE < TILE ? w->rows - tile * TILE : TILE;
        uint8_t *copy = NULL, *out = job->out + (tile - job->first) * TILE * columns * size;
        if (safe(w, tile)) unpack(w, direct ? (void *)out : rows, tile, tile + 1);
        else if ((copy = with_room(w, tile, &alone, offsets))) unpack(&alone, direct ? (void *)out : rows, 0, 1);
        else job->failed = 1;
        free(copy);
        if (direct || job->failed) continue;
        for (int64_t r = 0; scaled && r < count; r++) {
            float scale = float_at(w->scale, tile * TILE + r);
            for (int64_t k = 0; k < columns; k++) rows[r * columns + k] *= scale;
        }
        write_values(out, job->out_type, rows, count * columns);
    }
    if (!rows) job->failed = 1;
    free(rows);
}

/* Rows of W from `first`, a multiple of 4, to `end`, another or the last, as contiguous floats of the type given;
 * `unscaled`: without the scales of 8-bit values. */
EXPORT int secateur_unpack(const Matrix *w, int64_t first, int64_t end, uint8_t *out, int out_type, int unscaled,
                           int threads) {
    Job job = {.w = w, .out = out, .out_type = out_type, .first = first / TILE, .end = ceil_div(end, TILE),
               .unscaled = unscaled};
    share(unpack_chunk, &job, threads, CHUNK_BYTES);
    return job.failed ? NO_MEMORY : DONE;
}
