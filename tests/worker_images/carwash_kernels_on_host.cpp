// The kernels as C++ for the host: what CUDA gives them, and a loop for the grid. Blocks have one thread, so
// that there is nobody to synchronise with; the grid has as many blocks as there would be threads.
#include <cstdint>

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
struct uint4 {
    unsigned x, y, z, w;
};
struct Dimension {
    unsigned x;
};
static Dimension threadIdx, blockIdx, blockDim, gridDim;
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static void __stcs(uint4 *at, uint4 value) { *at = value; }
static uint4 __ldcs(const uint4 *at) { return *at; }
static void atomicAdd(unsigned long long *at, unsigned long long value) { *at += value; }
static void __syncthreads() {}

#include KERNELS

static void each_thread(unsigned threads, void (*run)(void **), void **given)
{
    gridDim.x = threads, blockDim.x = 1, threadIdx.x = 0;
    for (blockIdx.x = 0; blockIdx.x < threads; blockIdx.x++)
        run(given);
}

extern "C" void host_fill(
    unsigned threads, uint4 *data, u64 vectors, u64 first, u32 key0, u32 key1, u32 flip)
{
    void *given[] = {data, &vectors, &first, &key0, &key1, &flip};
    each_thread(threads, [](void **g) {
        fill((uint4 *)g[0], *(u64 *)g[1], *(u64 *)g[2], *(u32 *)g[3], *(u32 *)g[4], *(u32 *)g[5]);
    }, given);
}

extern "C" void host_unlike_pattern(
    unsigned threads, uint4 *data, u64 vectors, u64 first, u32 key0, u32 key1, u32 flip, u64 *counts)
{
    void *given[] = {data, &vectors, &first, &key0, &key1, &flip, counts};
    each_thread(threads, [](void **g) {
        unlike_pattern(
            (uint4 *)g[0], *(u64 *)g[1], *(u64 *)g[2], *(u32 *)g[3], *(u32 *)g[4], *(u32 *)g[5], (u64 *)g[6]);
    }, given);
}

extern "C" void host_unlike_word(unsigned threads, uint4 *data, u64 vectors, u32 word, u64 *counts)
{
    void *given[] = {data, &vectors, &word, counts};
    each_thread(threads, [](void **g) {
        unlike_word((uint4 *)g[0], *(u64 *)g[1], *(u32 *)g[2], (u64 *)g[3]);
    }, given);
}
