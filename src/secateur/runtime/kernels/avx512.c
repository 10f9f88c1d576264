/* Kernels for x86 processors with AVX-512 VBMI2 (Ice Lake, Zen 4 and later), which expand by a mask in one instruction. */
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI2__)
#include <immintrin.h>
#include <pthread.h>

enum { LANES = 16 };
typedef __m512 vec;

static inline vec zero(void) { return _mm512_setzero_ps(); }
static inline vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store_float(float *p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec madd(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline float sum(vec v) { return _mm512_reduce_add_ps(v); }

#define CHUNK(mask, s) ((size_t)((mask) >> (16 * (s)) & 0xffff))
#define COUNT(chunk) ((int64_t)__builtin_popcountll(chunk))

static inline vec from_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
static inline vec from_i8(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); }

/* Loaded apart: expanding straight from memory is several times slower than from a register. */
#define LOADED(name, type, load)                                                                                      \
    static inline type name(const uint8_t *p) {                                                                       \
        type v = load;                                                                                                \
        __asm__("" : "+v"(v));                                                                                        \
        return v;                                                                                                     \
    }
LOADED(load512, __m512i, _mm512_loadu_si512(p))
LOADED(load256, __m256i, _mm256_loadu_si256((const __m256i *)p))
LOADED(load128, __m128i, _mm_loadu_si128((const __m128i *)p))

static inline vec expand_f32(const uint8_t *p, size_t chunk) {
    return _mm512_castsi512_ps(_mm512_maskz_expand_epi32((__mmask16)chunk, load512(p)));
}
static inline __m256i expand_raw16(const uint8_t *p, size_t chunk) {
    return _mm256_maskz_expand_epi16((__mmask16)chunk, load256(p));
}
static inline vec expand_bf16(const uint8_t *p, size_t chunk) { return from_bf16(expand_raw16(p, chunk)); }
static inline vec expand_f16(const uint8_t *p, size_t chunk) { return _mm512_cvtph_ps(expand_raw16(p, chunk)); }
static inline vec expand_i8(const uint8_t *p, size_t chunk) {
    return from_i8(_mm_maskz_expand_epi8((__mmask16)chunk, load128(p)));
}

static inline vec read_f32(const uint8_t *p) { return _mm512_loadu_ps((const float *)p); }
static inline vec read_bf16(const uint8_t *p) { return from_bf16(load256(p)); }
static inline vec read_f16(const uint8_t *p) { return _mm512_cvtph_ps(load256(p)); }
static inline vec read_i8(const uint8_t *p) { return from_i8(load128(p)); }

static inline void store_uint16_t(uint16_t *p, __m256i v) { _mm256_storeu_si256((__m256i *)p, v); }

typedef char Steps;
static inline Steps steps_from(const Matrix *w) { return (void)w, 0; }
static inline int step_masks(const Steps *s, const uint8_t *p, uint64_t m[TILE]) { return (void)s, (void)p, (void)m, 0; }

#include "rows.h"

/* bitmask with 32 weights to an expansion. */
#define WIDE_BITMASK(type, TYPE, ADD)                                                                                 \
    static void wide_bitmask_##type(const Matrix *w, const float *x, int64_t slots, int batch, float *y, int64_t ldy,  \
                                    int64_t begin, int64_t end) {                                                     \
        if (batch > 1) {                                                                                              \
            batch_bitmask_##type(w, x, slots, batch, y, ldy, begin, end);                                             \
            return;                                                                                                   \
        }                                                                                                             \
        int64_t blocks = blocks_of(w);                                                                                \
        for (int64_t tile = begin; tile < end; tile++) {                                                              \
            Cursor at = start_of(w, tile, NULL);                                                                      \
            vec sums[1][TILE] = {{zero(), zero(), zero(), zero()}}, more[TILE] = {zero(), zero(), zero(), zero()};     \
            for (int64_t i = 0; i < blocks; i++, at.where += TILE * BLOCK / 8) {                                      \
                uint64_t mask[TILE];                                                                                  \
                const uint8_t *v[TILE];                                                                               \
                _Pragma("GCC unroll 4") for (int r = 0; r < TILE; r++) {                                              \
                    __builtin_prefetch(at.values + AHEAD);                                                            \
                    mask[r] = load64(at.where + 8 * r);                                                               \
                    v[r] = at.values;                                                                                 \
                    at.values += held(mask[r]) * SIZE[TYPE];                                                          \
                }                                                                                                     \
                _Pragma("GCC unroll 2") for (int first = 0; first < BLOCK; first += 32) {                             \
                    const float *xs = x + i * BLOCK + first;                                                          \
                    vec x0 = load(xs), x1 = load(xs + 16);                                                            \
                    _Pragma("GCC unroll 4") for (int r = 0; r < TILE; r++) {                                          \
                        __mmask32 chunk = (__mmask32)(mask[r] >> first);                                              \
                        ADD(chunk, v[r], sums[0][r], more[r]);                                                        \
                        v[r] += COUNT(chunk) * SIZE[TYPE];                                                            \
                    }                                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
            for (int r = 0; r < TILE; r++) sums[0][r] = _mm512_add_ps(sums[0][r], more[r]);                           \
            write_sums(sums, 1, y + tile * TILE, ldy);                                                                \
        }                                                                                                             \
    }

/* A pair of bf16 is two floats but for a shift and a mask, so even and odd inputs are wanted apart. */
#define ADD_BF16(chunk, v, s, t)                                                                                      \
    __m512i pairs = _mm512_maskz_expand_epi16(chunk, load512(v));                                                     \
    s = madd(_mm512_permutex2var_ps(x0, even, x1), _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), s);             \
    t = madd(_mm512_permutex2var_ps(x0, odd, x1), _mm512_castsi512_ps(_mm512_and_si512(pairs, high)), t)
#define ADD_F16(chunk, v, s, t)                                                                                       \
    __m512i halves = _mm512_maskz_expand_epi16(chunk, load512(v));                                                    \
    s = madd(x0, _mm512_cvtph_ps(_mm512_castsi512_si256(halves)), s);                                                 \
    t = madd(x1, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), t)
#define ADD_I8(chunk, v, s, t)                                                                                        \
    __m256i bytes = _mm256_maskz_expand_epi8(chunk, load256(v));                                                      \
    s = madd(x0, from_i8(_mm256_castsi256_si128(bytes)), s);                                                          \
    t = madd(x1, from_i8(_mm256_extracti128_si256(bytes, 1)), t)

#define even _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define odd _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define high _mm512_set1_epi32((int)0xffff0000)
WIDE_BITMASK(bf16, BF16, ADD_BF16)
WIDE_BITMASK(f16, F16, ADD_F16)
WIDE_BITMASK(i8, I8, ADD_I8)

static Kernels avx512;

static void make_kernels(void) {
    const Kernels *narrower = secateur_avx2();
    avx512 = (Kernels){
        "avx512",
        {ALL_TYPES(dense_), {bitmask_f32, wide_bitmask_bf16, wide_bitmask_f16, wide_bitmask_i8}, {NULL}},
        {ALL_DENSE, ALL_TYPES(unpack_bitmask_), {NULL}},
        {unpack_dense_raw16, unpack_bitmask_raw16, NULL},
        {NULL},
    };
    /* What is picked rather than expanded is bound by memory with AVX2 already. */
    memcpy(avx512.rows[NM], narrower->rows[NM], sizeof avx512.rows[NM]);
    memcpy(avx512.unpack[NM], narrower->unpack[NM], sizeof avx512.unpack[NM]);
    avx512.unpack16[NM] = narrower->unpack16[NM];
    memcpy(avx512.rows8, narrower->rows8, sizeof avx512.rows8);
}

const Kernels *secateur_avx512(void) {
    static pthread_once_t made = PTHREAD_ONCE_INIT; /* others may be computing with them */
    if (!secateur_avx2() || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vbmi2"))
        return NULL;
    pthread_once(&made, make_kernels);
    return &avx512;
}
#else
const Kernels *secateur_avx512(void) { return NULL; }
#endif
