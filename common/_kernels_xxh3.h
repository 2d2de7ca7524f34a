/* XXH3 with 128 bits, seed 0, the default secret, of messages of LEAF bytes; once per instruction set. Expects LEVEL and
   LNAME(x).

   The length is fixed, so only the form for long messages is here: 63 blocks of 16 stripes of 64 bytes, the accumulators
   scrambled after each, then 15 stripes, then the last 64 bytes once more with a secret of their own. */

#ifndef REFLEET_KERNELS_XXH3_H
#define REFLEET_KERNELS_XXH3_H

#define LEAF ((size_t)65536)
#define LEAF_DIGEST 16
#define STRIPE 64
#define AHEAD 1024 /* bytes asked for before they are needed */
#define STRIPES 16 /* of a block: the secret moves on by 8 bytes with each, until it ends */
#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
enum { SECRET_BYTES = 192, SECRET_SCRAMBLE = 128, SECRET_LAST = 121, SECRET_LOW = 11, SECRET_HIGH = 117 };

static const uint8_t SECRET[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xB8, 0xFE, 0x6C, 0x39, 0x23, 0xA4, 0x4B, 0xBE, 0x7C, 0x01, 0x81, 0x2C, 0xF7, 0x21, 0xAD, 0x1C,
    0xDE, 0xD4, 0x6D, 0xE9, 0x83, 0x90, 0x97, 0xDB, 0x72, 0x40, 0xA4, 0xA4, 0xB7, 0xB3, 0x67, 0x1F,
    0xCB, 0x79, 0xE6, 0x4E, 0xCC, 0xC0, 0xE5, 0x78, 0x82, 0x5A, 0xD0, 0x7D, 0xCC, 0xFF, 0x72, 0x21,
    0xB8, 0x08, 0x46, 0x74, 0xF7, 0x43, 0x24, 0x8E, 0xE0, 0x35, 0x90, 0xE6, 0x81, 0x3A, 0x26, 0x4C,
    0x3C, 0x28, 0x52, 0xBB, 0x91, 0xC3, 0x00, 0xCB, 0x88, 0xD0, 0x65, 0x8B, 0x1B, 0x53, 0x2E, 0xA3,
    0x71, 0x64, 0x48, 0x97, 0xA2, 0x0D, 0xF9, 0x4E, 0x38, 0x19, 0xEF, 0x46, 0xA9, 0xDE, 0xAC, 0xD8,
    0xA8, 0xFA, 0x76, 0x3F, 0xE3, 0x9C, 0x34, 0x3F, 0xF9, 0xDC, 0xBB, 0xC7, 0xC7, 0x0B, 0x4F, 0x1D,
    0x8A, 0x51, 0xE0, 0x4B, 0xCD, 0xB4, 0x59, 0x31, 0xC8, 0x9F, 0x7E, 0xC9, 0xD9, 0x78, 0x73, 0x64,
    0xEA, 0xC5, 0xAC, 0x83, 0x34, 0xD3, 0xEB, 0xC3, 0xC5, 0x81, 0xA0, 0xFF, 0xFA, 0x13, 0x63, 0xEB,
    0x17, 0x0D, 0xDD, 0x51, 0xB7, 0xF0, 0xDA, 0x49, 0xD3, 0x16, 0x55, 0x26, 0x29, 0xD4, 0x68, 0x9E,
    0x2B, 0x16, 0xBE, 0x58, 0x7D, 0x47, 0xA1, 0xFC, 0x8F, 0xF8, 0xB8, 0xD1, 0x7A, 0xD0, 0x31, 0xCE,
    0x45, 0xCB, 0x3A, 0x8F, 0x95, 0x16, 0x04, 0x28, 0xAF, 0xD7, 0xFB, 0xCA, 0xBB, 0x4B, 0x40, 0x7E,
};

static const uint64_t ACCUMULATORS[8] __attribute__((aligned(64))) = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                                                      PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

static inline uint64_t fold(uint64_t one, uint64_t other) {
    unsigned __int128 product = (unsigned __int128)one * other;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merged(const uint64_t sums[8], const uint8_t *secret, uint64_t start) {
    for (int n = 0; n < 8; n += 2)
        start += fold(sums[n] ^ load_little(secret + 8 * n, 8), sums[n + 1] ^ load_little(secret + 8 * n + 8, 8));
    start = (start ^ start >> 37) * 0x165667919E3779F9u;
    return start ^ start >> 32;
}

/* The digest in its canonical form: big-endian, the high half first. */
static void finish_leaf(const uint64_t sums[8], uint8_t *digest) {
    uint64_t high = merged(sums, SECRET + SECRET_HIGH, ~(LEAF * PRIME64_2));
    uint64_t low = merged(sums, SECRET + SECRET_LOW, LEAF * PRIME64_1);
    store_little(digest, __builtin_bswap64(high), 8);
    store_little(digest + 8, __builtin_bswap64(low), 8);
}

#endif

/* The accumulators in registers, and what one of those does. */
#if LEVEL == AVX512
#define REGISTER __m512i
#define REGISTERS 1
#define LOAD(from, lane) _mm512_loadu_si512((const uint8_t *)(from) + 64 * (lane))
#define STORE(to, lane, value) _mm512_storeu_si512((uint8_t *)(to) + 64 * (lane), value)
#define OP(name) _mm512_##name##_epi64
#define XOR(one, other) _mm512_xor_si512(one, other)
#define PRODUCT(one, other) _mm512_mul_epu32(one, other)
#define SWAPPED(data) _mm512_shuffle_epi32(data, 0x4E) /* the other word of each pair */
#define EVERY(word) _mm512_set1_epi64(word)
#elif LEVEL == AVX2
#define REGISTER __m256i
#define REGISTERS 2
#define LOAD(from, lane) _mm256_loadu_si256((const __m256i *)(from) + (lane))
#define STORE(to, lane, value) _mm256_storeu_si256((__m256i *)(to) + (lane), value)
#define OP(name) _mm256_##name##_epi64
#define XOR(one, other) _mm256_xor_si256(one, other)
#define PRODUCT(one, other) _mm256_mul_epu32(one, other)
#define SWAPPED(data) _mm256_shuffle_epi32(data, 0x4E)
#define EVERY(word) _mm256_set1_epi64x(word)
#else
#define REGISTER uint64_t
#define REGISTERS 8
#define LOAD(from, lane) load_little((const uint8_t *)(from) + 8 * (lane), 8)
#define STORE(to, lane, value) ((to)[lane] = (value))
#endif

INLINE void LNAME(add_stripe)(REGISTER sums[REGISTERS], const uint8_t *stripe, const uint8_t *secret) {
    for (unsigned lane = 0; lane < REGISTERS; lane++) {
#if LEVEL > SCALAR
        REGISTER data = LOAD(stripe, lane), mixed = XOR(data, LOAD(secret, lane));
        sums[lane] = OP(add)(OP(add)(sums[lane], SWAPPED(data)), PRODUCT(mixed, OP(srli)(mixed, 32)));
#else
        uint64_t data = LOAD(stripe, lane), mixed = data ^ LOAD(secret, lane);
        sums[lane ^ 1] += data;
        sums[lane] += (mixed & 0xFFFFFFFF) * (mixed >> 32);
#endif
    }
}

INLINE void LNAME(scramble)(REGISTER sums[REGISTERS]) {
    for (unsigned lane = 0; lane < REGISTERS; lane++) {
#if LEVEL > SCALAR
        const REGISTER prime = EVERY(PRIME32_1);
        REGISTER mixed = XOR(XOR(sums[lane], OP(srli)(sums[lane], 47)), LOAD(SECRET + SECRET_SCRAMBLE, lane));
        REGISTER high = PRODUCT(OP(srli)(mixed, 32), prime); /* 64 x 32 bits in two products */
        sums[lane] = OP(add)(PRODUCT(mixed, prime), OP(slli)(high, 32));
#else
        sums[lane] = (sums[lane] ^ sums[lane] >> 47 ^ LOAD(SECRET + SECRET_SCRAMBLE, lane)) * PRIME32_1;
#endif
    }
}

/* The digests of `count` leaves, one after the other. */
static void LNAME(leaves)(const uint8_t *data, size_t count, uint8_t *digests) {
    for (const uint8_t *end = data + count * LEAF; data < end; digests += LEAF_DIGEST) {
        REGISTER sums[REGISTERS];
        for (unsigned lane = 0; lane < REGISTERS; lane++) sums[lane] = LOAD(ACCUMULATORS, lane);
        for (unsigned block = 0; block < LEAF / (STRIPE * STRIPES); block++) {
            const unsigned last = block == LEAF / (STRIPE * STRIPES) - 1; /* the last stripe is not like the others */
            for (unsigned n = 0; n < STRIPES - last; n++, data += STRIPE) {
                __builtin_prefetch(data + AHEAD);
                LNAME(add_stripe)(sums, data, SECRET + 8 * n);
            }
            if (!last) LNAME(scramble)(sums);
        }
        LNAME(add_stripe)(sums, data, SECRET + SECRET_LAST);
        data += STRIPE;
        uint64_t words[8];
        for (unsigned lane = 0; lane < REGISTERS; lane++) STORE(words, lane, sums[lane]);
        finish_leaf(words, digests);
    }
}

#undef REGISTER
#undef REGISTERS
#undef LOAD
#undef STORE
#undef OP
#undef XOR
#undef PRODUCT
#undef SWAPPED
#undef EVERY
