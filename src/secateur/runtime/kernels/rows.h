/* Kernels of every format and type, over vectors of one instruction set.
 *
 * The including file defines, for vectors of LANES floats:
 *   vec, zero(), load(p), store_float(p, v), madd(a, b, c) = a * b + c, sum(v);
 *   read_f32 (and bf16, f16, i8), to widen LANES values;
 *   CHUNK(mask, s), a number made of LANES bits of a mask from bit s * LANES on, and COUNT(chunk), how many are set;
 *   expand_f32 (and bf16, f16, i8), to widen the next values to where a chunk has bits, with zeros elsewhere;
 *   expand_raw16 and store_uint16_t, the same for values of 16 bits as they are;
 *   for `nm` Steps, steps_from(w) and step_masks(steps, index, masks), which may say that it cannot.
 * Reads may go OVERREAD bytes beyond a tile's data. */

/* gcc spills pointers and reads x again from memory unless it is told that they change. */
#define KEEP_IN_REGISTERS(a, b, c, d) __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d))
#ifdef __x86_64__
#define KEEP_VECTOR(v) __asm__ volatile("" : "+x"(v))
#else
#define KEEP_VECTOR(v) ((void)0)
#endif

static inline int64_t held(uint64_t mask) { return __builtin_popcountll(mask); }

/* Add the product of a tile's block with a block of each row of x to sums[row of x][row of W]. */
static inline void add_block(float block[TILE][BLOCK], const float *x, int64_t slots, int batch, vec sums[][TILE]) {
    for (int b = 0; b < batch; b++, x += slots) {
        vec s0 = sums[b][0], s1 = sums[b][1], s2 = sums[b][2], s3 = sums[b][3];
        for (int j = 0; j < BLOCK; j += LANES) {
            vec xs = load(x + j);
            s0 = madd(xs, load(block[0] + j), s0);
            s1 = madd(xs, load(block[1] + j), s1);
            s2 = madd(xs, load(block[2] + j), s2);
            s3 = madd(xs, load(block[3] + j), s3);
        }
        sums[b][0] = s0, sums[b][1] = s1, sums[b][2] = s2, sums[b][3] = s3;
    }
}

static inline void clear(vec sums[][TILE], int batch) {
    for (int b = 0; b < batch; b++)
        for (int r = 0; r < TILE; r++) sums[b][r] = zero();
}

static inline void write_sums(vec sums[][TILE], int batch, float *y, int64_t ldy) {
    for (int b = 0; b < batch; b++)
        for (int r = 0; r < TILE; r++) y[b * ldy + r] = sum(sums[b][r]);
}

/* Copy a block's columns to where they belong in `out`: from slots, which may have gaps, to columns. */
static inline void write_block(const Matrix *w, const void *block, int size, uint8_t *out, int64_t rows, int64_t index) {
    int64_t wide = step_columns(w), columns = wide * (BLOCK / STEP), first = index * columns;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *slots = (const uint8_t *)block + r * BLOCK * size;
        uint8_t *row = out + (r * w->columns + first) * size;
        if (wide == STEP && first + BLOCK <= w->columns) memcpy(row, slots, (size_t)(BLOCK * size));
        else
            for (int64_t c = 0; c < columns && first + c < w->columns; c += wide) {
                int64_t left = w->columns - first - c;
                memcpy(row + c * size, slots + c / wide * STEP * size, (size_t)((left < wide ? left : wide) * size));
            }
    }
}

/* Functions of one format and type over a function that decodes its blocks one after the other. */
#define BY_BLOCKS(format, type)                                                                                       \
    static void batch_##format##_##type(const Matrix *w, const float *x, int64_t slots, int batch, float *y,           \
                                        int64_t ldy, int64_t begin, int64_t end) {                                     \
        int64_t blocks = blocks_of(w);                                                                                \
        Steps steps = steps_from(w);                                                                                  \
        for (int64_t tile = begin; tile < end; tile++) {                                                              \
            Cursor at = start_of(w, tile, &steps);                                                                    \
            vec sums[MAX_BATCH][TILE];                                                                                \
            clear(sums, batch);                                                                                       \
            for (int64_t i = 0; i < blocks; i++) {                                                                    \
                float block[TILE][BLOCK];                                                                             \
                decode_##format##_##type(w, &at, i, block);                                                           \
                add_block(block, x + i * BLOCK, slots, batch, sums);                                                  \
            }                                                                                                         \
            write_sums(sums, batch, y + tile * TILE, ldy);                                                            \
        }                                                                                                             \
    }                                                                                                                 \
    UNPACK(format, type, float)

#define UNPACK(format, type, element)                                                                                 \
    static void unpack_##format##_##type(const Matrix *w, void *out, int64_t begin, int64_t end) {                     \
        int64_t blocks = blocks_of(w), size = sizeof(element);                                                        \
        Steps steps = steps_from(w);                                                                                  \
        for (int64_t tile = begin; tile < end; tile++) {                                                              \
            Cursor at = start_of(w, tile, &steps);                                                                    \
            int64_t rows = w->rows - tile * TILE < TILE ? w->rows - tile * TILE : TILE;                               \
            for (int64_t i = 0; i < blocks; i++) {                                                                    \
                element block[TILE][BLOCK];                                                                           \
                decode_##format##_##type(w, &at, i, block);                                                           \
                write_block(w, block, (int)size, (uint8_t *)out + (tile - begin) * TILE * w->columns * size, rows, i); \
            }                                                                                                         \
        }                                                                                                             \
    }

typedef struct {
    const uint8_t *values, *where;
    const Steps *steps;
} Cursor;

static inline Cursor start_of(const Matrix *w, int64_t tile, const Steps *steps) {
    return (Cursor){w->values + w->offsets[tile] * SIZE[w->type], w->where + tile * where_bytes(w), steps};
}

/* bitmask: four rows at a time, from four places of one stream of values. */
#define DECODE_BITMASK(type, TYPE, element)                                                                           \
    static inline void decode_bitmask_##type(const Matrix *w, Cursor *at, int64_t i, element block[TILE][BLOCK]) {     \
        (void)w, (void)i;                                                                                             \
        for (int r = 0; r < TILE; r++, at->where += BLOCK / 8) {                                                      \
            uint64_t mask = load64(at->where);                                                                        \
            _Pragma("GCC unroll 16") for (int s = 0; s < BLOCK / LANES; s++) {                                        \
                size_t chunk = CHUNK(mask, s);                                                                        \
                store_##element(block[r] + s * LANES, expand_##type(at->values, chunk));                              \
                at->values += COUNT(chunk) * SIZE[TYPE];                                                              \
            }                                                                                                         \
        }                                                                                                             \
    }

#define BITMASK_KERNELS(type, TYPE)                                                                                   \
    DECODE_BITMASK(type, TYPE, float)                                                                                 \
    BY_BLOCKS(bitmask, type)                                                                                          \
    static void bitmask_##type(const Matrix *w, const float *x, int64_t slots, int batch, float *y, int64_t ldy,       \
                               int64_t begin, int64_t end) {                                                          \
        if (batch > 1) {                                                                                              \
            batch_bitmask_##type(w, x, slots, batch, y, ldy, begin, end);                                             \
            return;                                                                                                   \
        }                                                                                                             \
        int64_t blocks = blocks_of(w);                                                                                \
        for (int64_t tile = begin; tile < end; tile++) {                                                              \
            Cursor at = start_of(w, tile, NULL);                                                                      \
            const uint8_t *v = at.values;                                                                             \
            vec s0 = zero(), s1 = s0, s2 = s0, s3 = s0;                                                               \
            for (int64_t i = 0; i < blocks; i++, at.where += TILE * BLOCK / 8) {                                      \
                uint64_t m0 = load64(at.where), m1 = load64(at.where + 8), m2 = load64(at.where + 16),                \
                         m3 = load64(at.where + 24);                                                                  \
                const uint8_t *v0 = v, *v1 = v0 + held(m0) * SIZE[TYPE], *v2 = v1 + held(m1) * SIZE[TYPE],            \
                              *v3 = v2 + held(m2) * SIZE[TYPE];                                                       \
                v = v3 + held(m3) * SIZE[TYPE];                                                                       \
                _Pragma("GCC unroll 16") for (int s = 0; s < BLOCK / LANES; s++) {                                    \
                    vec xs = load(x + i * BLOCK + s * LANES);                                                         \
                    KEEP_VECTOR(xs);                                                                                  \
                    size_t c0 = CHUNK(m0, s), c1 = CHUNK(m1, s), c2 = CHUNK(m2, s), c3 = CHUNK(m3, s);                \
                    s0 = madd(xs, expand_##type(v0, c0), s0), v0 += COUNT(c0) * SIZE[TYPE];                           \
                    s1 = madd(xs, expand_##type(v1, c1), s1), v1 += COUNT(c1) * SIZE[TYPE];                           \
                    s2 = madd(xs, expand_##type(v2, c2), s2), v2 += COUNT(c2) * SIZE[TYPE];                           \
                    s3 = madd(xs, expand_##type(v3, c3), s3), v3 += COUNT(c3) * SIZE[TYPE];                           \
                    KEEP_IN_REGISTERS(v0, v1, v2, v3);                                                                \
                }                                                                                                     \
            }                                                                                                         \
            vec sums[1][TILE] = {{s0, s1, s2, s3}};                                                                   \
            write_sums(sums, 1, y + tile * TILE, ldy);                                                                \
        }                                                                                                             \
    }

/* nm: where step_masks can tell the places of each row of a step, values are expanded as those of a bitmask; else
 * place by place. */
#define DECODE_NM(type, TYPE, element, value)                                                                         \
    static inline void decode_nm_##type(const Matrix *w, Cursor *at, int64_t i, element block[TILE][BLOCK]) {          \
        int bits = index_bits(w), groups = step_groups(w), step_bytes = TILE * row_values(w) * bits / 8;              \
        int64_t left = steps_of(w) - i * (BLOCK / STEP);                                                              \
        memset(block, 0, sizeof(element) * TILE * BLOCK);                                                             \
        for (int s = 0; s < BLOCK / STEP && s < left; s++, at->where += step_bytes) {                                 \
            uint64_t masks[TILE];                                                                                     \
            if (step_masks(at->steps, at->where, masks)) {                                                            \
                for (int r = 0; r < TILE; r++)                                                                        \
                    _Pragma("GCC unroll 4") for (int j = 0; j < STEP / LANES; j++) {                                  \
                        size_t chunk = CHUNK(masks[r], j);                                                            \
                        store_##element(block[r] + s * STEP + j * LANES, expand_##type(at->values, chunk));           \
                        at->values += COUNT(chunk) * SIZE[TYPE];                                                      \
                    }                                                                                                 \
                continue;                                                                                             \
            }                                                                                                         \
            for (int r = 0, bit = 0; r < TILE; r++)                                                                   \
                for (int g = 0; g < groups; g++)                                                                      \
                    for (int k = 0; k < w->n; k++, bit += bits, at->values += SIZE[TYPE])                             \
                        block[r][s * STEP + g * w->m + (at->where[bit >> 3] >> (bit & 7) & ((1 << bits) - 1))] =      \
                            value;                                                                                    \
        }                                                                                                             \
    }

#define NM_KERNELS(type, TYPE)                                                                                        \
    DECODE_NM(type, TYPE, float, value_at(at->values, TYPE))                                                          \
    BY_BLOCKS(nm, type)

/* dense, row-major: a row at a time, so that weights are read as one stream. */
#define DENSE_KERNELS(type, TYPE)                                                                                     \
    static void dense_##type(const Matrix *w, const float *x, int64_t slots, int batch, float *y, int64_t ldy,         \
                             int64_t begin, int64_t end) {                                                            \
        int64_t last = end * TILE < w->rows ? end * TILE : w->rows, whole = w->columns / (4 * LANES) * (4 * LANES);   \
        for (int64_t row = begin * TILE; row < last; row++) {                                                         \
            const uint8_t *v = w->values + row * w->columns * SIZE[TYPE];                                             \
            for (int b = 0; b < batch; b++) {                                                                         \
                const float *xs = x + b * slots;                                                                      \
                vec s[4] = {zero(), zero(), zero(), zero()};                                                          \
                for (int64_t k = 0; k < whole; k += 4 * LANES)                                                        \
                    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) s[j] =                                        \
                        madd(load(xs + k + j * LANES), read_##type(v + (k + j * LANES) * SIZE[TYPE]), s[j]);          \
                float total = sum(s[0]) + sum(s[1]) + (sum(s[2]) + sum(s[3]));                                        \
                for (int64_t k = whole; k < w->columns; k++) total += xs[k] * value_at(v + k * SIZE[TYPE], TYPE);     \
                y[b * ldy + row] = total;                                                                             \
            }                                                                                                         \
        }                                                                                                             \
    }

#define EVERY_KERNEL(type, TYPE) BITMASK_KERNELS(type, TYPE) NM_KERNELS(type, TYPE) DENSE_KERNELS(type, TYPE)
EVERY_KERNEL(f32, F32)
EVERY_KERNEL(bf16, BF16)
EVERY_KERNEL(f16, F16)
EVERY_KERNEL(i8, I8)

/* Values of 16 bits as they are, whatever they mean. */
DECODE_BITMASK(raw16, F16, uint16_t)
UNPACK(bitmask, raw16, uint16_t)
DECODE_NM(raw16, F16, uint16_t, load16(at->values))
UNPACK(nm, raw16, uint16_t)

static void unpack_dense(const Matrix *w, void *out, int64_t begin, int64_t end) {
    int64_t last = end * TILE < w->rows ? end * TILE : w->rows, first = begin * TILE * w->columns;
    for (int64_t k = first; k < last * w->columns; k++)
        ((float *)out)[k - first] = value_at(w->values + k * SIZE[w->type], w->type);
}
static void unpack_dense_raw16(const Matrix *w, void *out, int64_t begin, int64_t end) {
    int64_t last = end * TILE < w->rows ? end * TILE : w->rows, first = begin * TILE;
    memcpy(out, w->values + first * w->columns * 2, (size_t)((last - first) * w->columns * 2));
}

#define ALL_DENSE {unpack_dense, unpack_dense, unpack_dense, unpack_dense}
#define ALL_TYPES(prefix) {prefix##f32, prefix##bf16, prefix##f16, prefix##i8}
