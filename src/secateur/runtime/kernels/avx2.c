/* Kernels for x86 processors with AVX2, FMA and F16C. */
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#include <pthread.h>

enum { LANES = 8 };
typedef __m256 vec;

static inline vec zero(void) { return _mm256_setzero_ps(); }
static inline vec load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store_float(float *p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec madd(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Byte shuffles that put the next values where a mask's byte has bits, and zeros elsewhere. bf16 and int8 go to the top of
 * 32-bit lanes: a bf16 is the upper half of its float, and an int8 is shifted down with its sign. */
static uint8_t to_bf16[256][32] __attribute__((aligned(64)));
static uint8_t to_i8[256][32] __attribute__((aligned(64)));
static uint8_t to_f16[256][16] __attribute__((aligned(64)));
static int8_t to_f32[256][8] __attribute__((aligned(64))); /* lanes; -1 for none */

static void make_tables(void) {
    memset(to_bf16, 0x80, sizeof to_bf16);
    memset(to_i8, 0x80, sizeof to_i8);
    memset(to_f16, 0x80, sizeof to_f16);
    memset(to_f32, -1, sizeof to_f32);
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, k = 0; i < 8; i++)
            if (mask >> i & 1) {
                to_bf16[mask][4 * i + 2] = to_f16[mask][2 * i] = (uint8_t)(2 * k);
                to_bf16[mask][4 * i + 3] = to_f16[mask][2 * i + 1] = (uint8_t)(2 * k + 1);
                to_i8[mask][4 * i + 3] = (uint8_t)k;
                to_f32[mask][i] = (int8_t)k++;
            }
}

/* A byte of the mask times 32: the offset into a table, at no cost beyond the shift. */
#define CHUNK(mask, s)                                                                                                \
    ((size_t)(8 * (s) < 5 ? (mask) << 5 : (mask) >> (8 * (s) < 5 ? 0 : 8 * (s)-5)) & ((size_t)0xff << 5))
#define COUNT(chunk) ((int64_t)__builtin_popcountll(chunk))

static inline __m256 expand_bf16(const uint8_t *p, size_t chunk) {
    __m256i pair = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(pair, *(const __m256i *)((const uint8_t *)to_bf16 + chunk)));
}
static inline __m128i expand_raw16(const uint8_t *p, size_t chunk) {
    const __m128i *shuffle = (const __m128i *)((const uint8_t *)to_f16 + chunk / 2);
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p), *shuffle);
}
static inline __m256 expand_f16(const uint8_t *p, size_t chunk) {
    return _mm256_cvtph_ps(expand_raw16(p, chunk));
}
static inline __m256 expand_i8(const uint8_t *p, size_t chunk) {
    __m256i eight = _mm256_set1_epi64x((long long)load64(p));
    __m256i tops = _mm256_shuffle_epi8(eight, *(const __m256i *)((const uint8_t *)to_i8 + chunk));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(tops, 24));
}
static inline __m256 expand_f32(const uint8_t *p, size_t chunk) {
    __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const uint8_t *)to_f32 + chunk / 4)));
    __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float *)p), from);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(from, 31)), moved);
}

static inline __m256 read_f32(const uint8_t *p) { return _mm256_loadu_ps((const float *)p); }
static inline __m256 read_bf16(const uint8_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline __m256 read_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline __m256 read_i8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

static inline void store_uint16_t(uint16_t *p, __m128i v) { _mm_storeu_si128((__m128i *)p, v); }

/* How the values of a step of `nm` lie in vectors of 8, where each 4 of them belong to one row. */
#define MOST 6 /* vectors: 4 rows of 12 values */
typedef struct {
    int per_row, bits; /* values of a row; 0 if they do not come in fours. Bits of an index */
    __m256i starts[MOST]; /* the first place of each value's group */
} Steps;

static inline Steps steps_from(const Matrix *w) {
    if (w->format != NM) return (Steps){0};
    Steps steps = {.per_row = row_values(w), .bits = index_bits(w)};
    if (steps.per_row % 4 || steps.per_row > 12) steps.per_row = 0;
    for (int i = 0; i < steps.per_row / 2; i++) {
        int32_t lane[8];
        for (int j = 0; j < 8; j++) lane[j] = (8 * i + j) % steps.per_row / w->n * w->m;
        steps.starts[i] = _mm256_loadu_si256((const __m256i *)lane);
    }
    return steps;
}

/* The places in a step of vector i's values. */
static inline __m256i places(const Steps *steps, const uint8_t *index, int i, int bits) {
    const uint8_t *p = index + i * bits;
    __m256i packed = _mm256_set1_epi32(bits == 4 ? (int)load32(p) : bits == 2 ? (int)load16(p) : (int)*p);
    __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    __m256i indices = _mm256_and_si256(_mm256_srlv_epi32(packed, shifts), _mm256_set1_epi32((1 << bits) - 1));
    return _mm256_add_epi32(indices, steps->starts[i]);
}

/* The places of each row's values in a step, as bits. */
static inline int step_masks(const Steps *steps, const uint8_t *index, uint64_t masks[TILE]) {
    memset(masks, 0, TILE * sizeof *masks);
    for (int i = 0; i < steps->per_row / 2; i++) {
        __m256i at = places(steps, index, i, steps->bits), bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), at);
        bit = _mm256_or_si256(bit, _mm256_shuffle_epi32(bit, 0x4e));
        bit = _mm256_or_si256(bit, _mm256_shuffle_epi32(bit, 0xb1));
        masks[8 * i / steps->per_row] |= (uint32_t)_mm256_cvtsi256_si32(bit);
        masks[(8 * i + 4) / steps->per_row] |= (uint32_t)_mm256_extract_epi32(bit, 4);
    }
    return steps->per_row;
}

#include "rows.h"

/* nm, where a row has 4, 8 or 12 values in a step: inputs are picked from the 16, weights are never expanded. */
#define PICKED_ROWS(type, TYPE)                                                                                       \
    static inline __attribute__((always_inline)) void picked_##type(const Matrix *w, const float *x, float *y,         \
                                                                    int64_t begin, int64_t end, int per_row,          \
                                                                    int bits) {                                       \
        const int count = per_row / 2;                                                                                \
        int64_t steps = steps_of(w);                                                                                  \
        Steps layout = steps_from(w);                                                                                 \
        for (int64_t tile = begin; tile < end; tile++) {                                                              \
            Cursor at = start_of(w, tile, NULL);                                                                      \
            vec sums[MOST];                                                                                           \
            for (int i = 0; i < count; i++) sums[i] = zero();                                                         \
            for (int64_t s = 0; s < steps; s++, at.values += 8 * count * SIZE[TYPE], at.where += count * bits) {      \
                vec low = load(x + s * STEP), high = load(x + s * STEP + 8);                                          \
                _Pragma("GCC unroll 6") for (int i = 0; i < count; i++) {                                             \
                    __m256i from = places(&layout, at.where, i, bits);                                                \
                    vec xs = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, from),                                    \
                                              _mm256_permutevar8x32_ps(high, from),                                   \
                                              _mm256_castsi256_ps(_mm256_slli_epi32(from, 28)));                      \
                    sums[i] = madd(xs, read_##type(at.values + 8 * i * SIZE[TYPE]), sums[i]);                         \
                }                                                                                                     \
            }                                                                                                         \
            float quads[8 * MOST];                                                                                    \
            for (int i = 0; i < count; i++) store_float(quads + 8 * i, sums[i]);                                      \
            for (int r = 0; r < TILE; r++) {                                                                          \
                float total = 0;                                                                                      \
                for (int k = 0; k < per_row; k++) total += quads[r * per_row + k];                                    \
                y[tile * TILE + r] = total;                                                                           \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    static void nm_##type(const Matrix *w, const float *x, int64_t slots, int batch, float *y, int64_t ldy,            \
                          int64_t begin, int64_t end) {                                                               \
        int per_row = row_values(w), bits = index_bits(w);                                                            \
        if (batch > 1) batch_nm_##type(w, x, slots, batch, y, ldy, begin, end);                                       \
        else if (per_row == 8 && bits == 4) picked_##type(w, x, y, begin, end, 8, 4);                                 \
        else if (per_row == 4 && bits == 4) picked_##type(w, x, y, begin, end, 4, 4);                                 \
        else if (per_row == 12 && bits == 4) picked_##type(w, x, y, begin, end, 12, 4);                               \
        else if (per_row == 8 && bits == 2) picked_##type(w, x, y, begin, end, 8, 2);                                 \
        else if (per_row == 4 && bits == 2) picked_##type(w, x, y, begin, end, 4, 2);                                 \
        else if (per_row == 12 && bits == 2) picked_##type(w, x, y, begin, end, 12, 2);                               \
        else if (per_row == 8 && bits == 1) picked_##type(w, x, y, begin, end, 8, 1);                                 \
        else batch_nm_##type(w, x, slots, batch, y, ldy, begin, end);                                                 \
    }
PICKED_ROWS(f32, F32)
PICKED_ROWS(bf16, BF16)
PICKED_ROWS(f16, F16)
PICKED_ROWS(i8, I8)

/* 8-bit activations: 16 inputs are one lane, indices are byte shuffles of it. Two steps at a time, one in each lane; of
 * the second's inputs beyond the row all are zero. maddubs wants |w| and x with w's sign: x is never -128, but w may be. */

/* The indices of 16 values of each of two steps, as bytes. */
static inline __m256i two_steps_indices(const uint8_t *first, const uint8_t *second, int bits) {
    if (bits == 4) {
        __m256i bytes = _mm256_cvtepu8_epi16(_mm_set_epi64x((long long)load64(second), (long long)load64(first)));
        return _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
    }
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_set_epi32(0, 0, (int)load32(second), (int)load32(first)));
    bytes = _mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12));
    return _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 6)), _mm256_set1_epi8(3));
}

static inline __m256i dot8(__m256i w, __m256i x) { /* sums of 4 products */
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

static inline __attribute__((always_inline)) void picked8(const Matrix *w, const int8_t *x, const float *x_scale,
                                                          int64_t slots, float *y, int64_t begin, int64_t end,
                                                          int per_row, int bits) {
    const int count = per_row / 4; /* lanes of 16 values in a step */
    const int64_t value_bytes = 4 * per_row, index_bytes = per_row * bits / 2;
    int64_t steps = steps_of(w);
    __m256i starts[3];
    for (int i = 0; i < count; i++) {
        uint8_t lane[16];
        for (int j = 0; j < 16; j++) lane[j] = (uint8_t)((16 * i + j) % per_row / w->n * w->m);
        starts[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)lane));
    }
    for (int64_t tile = begin; tile < end; tile++) {
        Cursor at = start_of(w, tile, NULL);
        vec sums[3] = {zero(), zero(), zero()};
        for (int64_t i = 0; i < slots / BLOCK; i++) {
            __m256i whole[3];
            for (int k = 0; k < count; k++) whole[k] = _mm256_setzero_si256();
            _Pragma("GCC unroll 2") for (int pair = 0; pair < 2; pair++) {
                if (i * 4 + pair * 2 >= steps) break;
                __m256i inputs = _mm256_loadu_si256((const __m256i *)(x + i * BLOCK + pair * 2 * STEP));
                __builtin_prefetch(at.values + AHEAD);
                __builtin_prefetch(at.where + AHEAD / 2);
                _Pragma("GCC unroll 3") for (int k = 0; k < count; k++) {
                    const uint8_t *index = at.where + 2 * k * bits, *value = at.values + 16 * k;
                    __m256i from = two_steps_indices(index, index + index_bytes, bits);
                    __m256i held = _mm256_inserti128_si256(
                        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)value)),
                        _mm_loadu_si128((const __m128i *)(value + value_bytes)), 1);
                    __m256i picked = _mm256_shuffle_epi8(inputs, _mm256_add_epi8(from, starts[k]));
                    whole[k] = _mm256_add_epi32(whole[k], dot8(held, picked));
                }
                at.values += 2 * value_bytes;
                at.where += 2 * index_bytes;
            }
            __m256 scale = _mm256_set1_ps(x_scale[i]);
            for (int k = 0; k < count; k++) sums[k] = madd(scale, _mm256_cvtepi32_ps(whole[k]), sums[k]);
        }
        float quads[12], rows[TILE] = {0};
        for (int k = 0; k < count; k++)
            _mm_storeu_ps(quads + 4 * k, _mm_add_ps(_mm256_castps256_ps128(sums[k]), _mm256_extractf128_ps(sums[k], 1)));
        for (int q = 0; q < per_row; q++) rows[4 * q / per_row] += quads[q];
        memcpy(y + tile * TILE, rows, sizeof rows);
    }
}

static void rows8_nm(const Matrix *w, const int8_t *x, const float *x_scale, int64_t slots, float *y, int64_t begin,
                     int64_t end) {
    int per_row = row_values(w), bits = index_bits(w);
    if (per_row == 8 && bits == 4) picked8(w, x, x_scale, slots, y, begin, end, 8, 4);
    else if (per_row == 4 && bits == 4) picked8(w, x, x_scale, slots, y, begin, end, 4, 4);
    else if (per_row == 12 && bits == 4) picked8(w, x, x_scale, slots, y, begin, end, 12, 4);
    else if (per_row == 8 && bits == 2) picked8(w, x, x_scale, slots, y, begin, end, 8, 2);
    else if (per_row == 4 && bits == 2) picked8(w, x, x_scale, slots, y, begin, end, 4, 2);
    else if (per_row == 12 && bits == 2) picked8(w, x, x_scale, slots, y, begin, end, 12, 2);
    else secateur_portable()->rows8[NM](w, x, x_scale, slots, y, begin, end);
}

static void rows8_dense(const Matrix *w, const int8_t *x, const float *x_scale, int64_t slots, float *y, int64_t begin,
                        int64_t end) {
    int64_t last = end * TILE < w->rows ? end * TILE : w->rows, blocks = w->columns / BLOCK;
    (void)slots;
    for (int64_t row = begin * TILE; row < last; row++) {
        const uint8_t *v = w->values + row * w->columns;
        vec s = zero();
        for (int64_t i = 0; i < blocks; i++) {
            const __m256i *ws = (const __m256i *)(v + i * BLOCK), *xs = (const __m256i *)(x + i * BLOCK);
            __m256i whole = _mm256_add_epi32(dot8(_mm256_loadu_si256(ws), _mm256_loadu_si256(xs)),
                                             dot8(_mm256_loadu_si256(ws + 1), _mm256_loadu_si256(xs + 1)));
            s = madd(_mm256_set1_ps(x_scale[i]), _mm256_cvtepi32_ps(whole), s);
        }
        int32_t rest = 0;
        for (int64_t k = blocks * BLOCK; k < w->columns; k++) rest += (int8_t)v[k] * x[k];
        y[row] = sum(s) + (blocks * BLOCK < w->columns ? (float)rest * x_scale[blocks] : 0);
    }
}

static const Kernels avx2 = {
    "avx2",
    {ALL_TYPES(dense_), ALL_TYPES(bitmask_), ALL_TYPES(nm_)},
    {ALL_DENSE, ALL_TYPES(unpack_bitmask_), ALL_TYPES(unpack_nm_)},
    {unpack_dense_raw16, unpack_bitmask_raw16, unpack_nm_raw16},
    {rows8_dense, NULL, rows8_nm},
};

const Kernels *secateur_avx2(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return NULL;
    static pthread_once_t made = PTHREAD_ONCE_INIT; /* others may be computing with them */
    pthread_once(&made, make_tables);
    return &avx2;
}
#else
const Kernels *secateur_avx2(void) { return NULL; }
#endif
