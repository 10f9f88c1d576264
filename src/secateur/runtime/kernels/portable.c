/* Kernels for any machine: vectors as the compiler makes them. */
#include "kernels.h"

enum { LANES = 4 };
typedef float vec __attribute__((vector_size(16)));

static inline vec zero(void) { return (vec){0, 0, 0, 0}; }
static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec madd(vec a, vec b, vec c) { return a * b + c; }
static inline float sum(vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

#define CHUNK(mask, s) ((size_t)((mask) >> (LANES * (s)) & 15))
#define COUNT(chunk) ((int64_t)__builtin_popcountll(chunk))

static inline vec read_values(const uint8_t *p, int type) {
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = value_at(p + i * SIZE[type], type);
    return v;
}

static inline vec expand_values(const uint8_t *p, size_t chunk, int type) {
    vec v;
    for (int i = 0; i < LANES; i++) {
        v[i] = chunk >> i & 1 ? value_at(p, type) : 0;
        p += (chunk >> i & 1) * (size_t)SIZE[type];
    }
    return v;
}

#define READ_AND_EXPAND(type, TYPE)                                                                                   \
    static inline vec read_##type(const uint8_t *p) { return read_values(p, TYPE); }                                  \
    static inline vec expand_##type(const uint8_t *p, size_t chunk) { return expand_values(p, chunk, TYPE); }
READ_AND_EXPAND(f32, F32)
READ_AND_EXPAND(bf16, BF16)
READ_AND_EXPAND(f16, F16)
READ_AND_EXPAND(i8, I8)

typedef uint64_t quarter; /* 4 values of 16 bits */
static inline quarter expand_raw16(const uint8_t *p, size_t chunk) {
    quarter v = 0;
    for (int i = 0; i < LANES; i++)
        if (chunk >> i & 1) v |= (quarter)load16(p) << 16 * i, p += 2;
    return v;
}
static inline void store_uint16_t(uint16_t *p, quarter v) {
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)(v >> 16 * i);
}

typedef char Steps;
static inline Steps steps_from(const Matrix *w) { return (void)w, 0; }
static inline int step_masks(const Steps *s, const uint8_t *p, uint64_t m[TILE]) { return (void)s, (void)p, (void)m, 0; }

#include "rows.h"

/* The definition of the 8-bit product: whole numbers are summed over a block, then scaled. */
static void rows8_nm(const Matrix *w, const int8_t *x, const float *x_scale, int64_t slots, float *y, int64_t begin,
                     int64_t end) {
    Steps steps = steps_from(w);
    for (int64_t tile = begin; tile < end; tile++) {
        Cursor at = start_of(w, tile, &steps);
        float sums[TILE] = {0};
        for (int64_t i = 0; i < slots / BLOCK; i++) {
            float block[TILE][BLOCK];
            decode_nm_i8(w, &at, i, block);
            for (int r = 0; r < TILE; r++) {
                int32_t whole = 0;
                for (int j = 0; j < BLOCK; j++) whole += (int32_t)block[r][j] * x[i * BLOCK + j];
                sums[r] += (float)whole * x_scale[i];
            }
        }
        memcpy(y + tile * TILE, sums, sizeof sums);
    }
}

static void rows8_dense(const Matrix *w, const int8_t *x, const float *x_scale, int64_t slots, float *y, int64_t begin,
                        int64_t end) {
    int64_t last = end * TILE < w->rows ? end * TILE : w->rows;
    (void)slots;
    for (int64_t row = begin * TILE; row < last; row++) {
        const int8_t *v = (const int8_t *)w->values + row * w->columns;
        float total = 0;
        for (int64_t i = 0; i * BLOCK < w->columns; i++) {
            int32_t whole = 0;
            for (int64_t k = i * BLOCK; k < w->columns && k < (i + 1) * BLOCK; k++) whole += (int32_t)v[k] * x[k];
            total += (float)whole * x_scale[i];
        }
        y[row] = total;
    }
}

static const Kernels portable = {
    "portable",
    {ALL_TYPES(dense_), ALL_TYPES(bitmask_), ALL_TYPES(batch_nm_)},
    {ALL_DENSE, ALL_TYPES(unpack_bitmask_), ALL_TYPES(unpack_nm_)},
    {unpack_dense_raw16, unpack_bitmask_raw16, unpack_nm_raw16},
    {rows8_dense, NULL, rows8_nm},
};

const Kernels *secateur_portable(void) { return &portable; }
