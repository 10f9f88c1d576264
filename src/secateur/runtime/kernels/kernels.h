/* What the files of this folder share. The layouts are those of docs/formats.md; names follow it.
 *
 * A kernel computes rows of y = W x from packed W. It works on row tiles of 4 rows, and sees x as float32 "slots": blocks
 * of 64 columns for `bitmask`; steps of 16 for `nm`, of which the first floor(16 / M) * M are columns and the others zero. */
#ifndef SECATEUR_KERNELS_H
#define SECATEUR_KERNELS_H

#include <stdint.h>
#include <string.h>

enum { DENSE, BITMASK, NM, FORMATS };
enum { F32, BF16, F16, I8, TYPES };
enum {
    TILE = 4,       /* rows of a tile */
    BLOCK = 64,     /* slots of a block */
    STEP = 16,      /* slots of an `nm` step */
    MAX_BATCH = 8,  /* rows of x that a kernel takes at once */
    OVERREAD = 64,  /* bytes that a kernel may read beyond the tiles it was given */
    AHEAD = 2048    /* bytes ahead of which memory is asked for: processors do not look over the end of a page */
};
#define EXPORT __attribute__((visibility("default")))
static const int SIZE[TYPES] = {4, 2, 2, 1};

/* One matrix; runtime/kernels/__init__.py mirrors this. */
typedef struct {
    int32_t format, type; /* of the values */
    int64_t rows, columns;
    int32_t n, m;              /* of `nm` */
    const uint8_t *values;     /* `count` of them, or rows x columns if dense */
    const uint8_t *where;      /* mask or indices */
    const int64_t *offsets;    /* where the values of each row tile begin, [row tiles + 1] */
    const float *scale;        /* [rows], for 8-bit values */
    int64_t count;
} Matrix;

/* y[b * ldy + row] = sum over slots of W[row] * x[b * slots + slot], for the rows of tiles begin to end; scales left out.
 * y may be written up to the end of the last tile. */
typedef void (*Rows)(const Matrix *w, const float *x, int64_t slots, int batch, float *y, int64_t ldy, int64_t begin,
                     int64_t end);
/* The same for 8-bit values, from 8-bit x with one scale for each block. */
typedef void (*Rows8)(const Matrix *w, const int8_t *x, const float *x_scale, int64_t slots, float *y, int64_t begin,
                      int64_t end);
/* out[row - first][column] = W[row][column] as float32, scales left out; rows of tiles begin to end below w->rows. */
typedef void (*Unpack)(const Matrix *w, void *out, int64_t begin, int64_t end);

typedef struct {
    const char *name;
    Rows rows[FORMATS][TYPES];
    Unpack unpack[FORMATS][TYPES];
    Unpack unpack16[FORMATS]; /* values of 16 bits as they are */
    Rows8 rows8[FORMATS]; /* may be NULL */
} Kernels;

const Kernels *secateur_portable(void);
const Kernels *secateur_avx2(void);   /* NULL where it was not compiled or cannot run */
const Kernels *secateur_avx512(void); /* likewise */

/* Calls work(context, chunk) for every chunk below `chunks`, on up to `threads` threads, the caller's among them. */
void secateur_parallel(void (*work)(void *context, int64_t chunk), void *context, int64_t chunks, int threads);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline uint32_t load32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint64_t load64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline uint16_t load16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

/* At any address, as in a file. */
static inline float float_at(const float *p, int64_t i) { return as_float(load32((const uint8_t *)p + 4 * i)); }

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | rest << 13); /* infinity, NaN */
    /* Exponents differ by 112: a multiplication moves them, and makes subnormals normal. */
    float magnitude = as_float(rest << 13) * as_float(0x77800000);
    return as_float(sign | as_bits(magnitude));
}

static inline float value_at(const uint8_t *p, int type) {
    switch (type) {
    case F32: return as_float(load32(p));
    case BF16: return as_float((uint32_t)load16(p) << 16);
    case F16: return half_to_float(load16(p));
    default: return (float)(int8_t)*p;
    }
}

/* Of `nm`. */
static inline int step_groups(const Matrix *w) { return STEP / w->m; }
static inline int step_columns(const Matrix *w) { return w->format == NM ? STEP / w->m * w->m : STEP; }
static inline int row_values(const Matrix *w) { return step_groups(w) * w->n; } /* of one row in a step */
static inline int index_bits(const Matrix *w) { return w->m <= 2 ? 1 : w->m <= 4 ? 2 : 4; }
static inline int64_t steps_of(const Matrix *w) { return ceil_div(w->columns, step_columns(w)); }
static inline int64_t blocks_of(const Matrix *w) { return ceil_div(steps_of(w), BLOCK / STEP); }
static inline int64_t tiles_of(const Matrix *w) { return ceil_div(w->rows, TILE); }

/* Bytes of mask or indices of one row tile. */
static inline int64_t where_bytes(const Matrix *w) {
    if (w->format == BITMASK) return blocks_of(w) * TILE * BLOCK / 8;
    return w->format == NM ? steps_of(w) * TILE * row_values(w) * index_bits(w) / 8 : 0;
}

#endif
