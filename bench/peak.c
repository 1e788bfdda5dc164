/* The peak rates of this machine's arithmetic units and memory, for bench/peak.py, which compiles this file.

   Each loop runs in `threads` threads at once and keeps its data in registers (fma_*) or streams it (copy_bytes).
   Sixteen sums are independent, because a multiply-add takes about four cycles and two begin in each cycle. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define SUMS 16
typedef float vector __attribute__((vector_size(BYTES)));

struct work { void (*run)(struct work *); long count; char *to; const char *from; size_t bytes; };
static volatile float seen; /* a result that is never used would be optimised away */

static void fp32_loop(struct work *work)
{
    vector sum[SUMS], factor = (vector){0} + 0.999f, term = (vector){0} + 0.001f;
    for (int i = 0; i < SUMS; i++) sum[i] = (vector){0} + (float)i;
    for (long n = 0; n < work->count; n++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * factor + term;
    float total = 0;
    for (int i = 0; i < SUMS; i++) total += sum[i][0];
    seen = total;
}

#if defined(__AVX512BF16__)
static void bf16_loop(struct work *work)
{
    __m512 sum[SUMS];
    __m512bh left = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f)), right = left;
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (long n = 0; n < work->count; n++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], left, right);
    float total = 0;
    for (int i = 0; i < SUMS; i++) total += _mm512_cvtss_f32(sum[i]);
    seen = total;
}
#endif

#if defined(__AMX_BF16__)
#define TILE_MACS (16 * 16 * 32) /* of one product of tiles: 16 rows of 32 pairs with 16 columns of them */
static void amx_loop(struct work *work)
{
    struct { unsigned char palette, start, reserved[14]; unsigned short bytes[16]; unsigned char rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    static const unsigned char zeros[16 * 64];
    _tile_loadconfig(&shape);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_loadd(4, zeros, 64); _tile_loadd(5, zeros, 64); _tile_loadd(6, zeros, 64); _tile_loadd(7, zeros, 64);
    for (long n = 0; n < work->count; n++) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    float out[16 * 16];
    _tile_stored(0, out, 64);
    _tile_release();
    seen = out[0];
}

/* Linux enables tiles per process, on request. */
int has_amx(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }
#else
int has_amx(void) { return 0; }
#endif

static void copy_loop(struct work *work)
{
    for (long n = 0; n < work->count; n++) memcpy(work->to, work->from, work->bytes);
    seen = work->to[work->bytes - 1];
}

static void *enter(void *work)
{
    ((struct work *)work)->run(work);
    return NULL;
}

static void run_all(struct work *works, int threads)
{
    pthread_t *ids = malloc(threads * sizeof *ids);
    for (int i = 1; i < threads; i++)
        if (pthread_create(&ids[i], NULL, enter, &works[i])) abort();
    enter(&works[0]);
    for (int i = 1; i < threads; i++) pthread_join(ids[i], NULL);
    free(ids);
}

static double spread(void (*run)(struct work *), long count, int threads)
{
    struct work *works = calloc(threads, sizeof *works);
    for (int i = 0; i < threads; i++) works[i] = (struct work){.run = run, .count = count};
    run_all(works, threads);
    free(works);
    return (double)count * SUMS * threads;
}

/* Multiply-adds done; 0 if the machine lacks the instruction. */
double fma_fp32(long count, int threads) { return spread(fp32_loop, count, threads) * BYTES / sizeof(float); }
#if defined(__AMX_BF16__)
double fma_bf16(long count, int threads)
{
    if (has_amx()) return spread(amx_loop, count, threads) / SUMS * 4 * TILE_MACS;
    return spread(bf16_loop, count, threads) * 32;
}
#elif defined(__AVX512BF16__)
double fma_bf16(long count, int threads) { return spread(bf16_loop, count, threads) * 32; }
#else
double fma_bf16(long count, int threads) { (void)count, (void)threads; return 0; }
#endif

/* Bytes read and written: `count` copies of `bytes` per thread, between the caller's buffers of `threads` * `bytes`. */
double copy_bytes(char *to, const char *from, size_t bytes, long count, int threads)
{
    struct work *works = calloc(threads, sizeof *works);
    for (int i = 0; i < threads; i++)
        works[i] = (struct work){.run = copy_loop, .count = count, .to = to + i * bytes, .from = from + i * bytes, .bytes = bytes};
    run_all(works, threads);
    free(works);
    return 2.0 * bytes * count * threads;
}

int vector_bits(void) { return BYTES * 8; }
