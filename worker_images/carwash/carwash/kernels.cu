// What runs on the GPU: write a pattern, and count what is not as it should be.
//
// Each thread walks the memory in strides of the whole grid, 16 bytes at a time, four of them at once, so that
// enough reads and writes are under way to fill the memory's bandwidth. `pattern` is the same function as
// `pattern.words` in Python.

typedef unsigned int u32;
typedef unsigned long long u64;

#define UNROLL 4

// A bijection of 32 bits that mixes well: lowbias32 of C. Wellons, "Prospecting for Hash Functions".
__device__ __forceinline__ u32 mix(u32 x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

__device__ __forceinline__ u32 halves_swapped(u32 x)
{
    return (x << 16) | (x >> 16);
}

// What stands in vector `index` of all memory. Two rounds of a Feistel network make the first eight bytes of no
// two vectors alike, so that memory which answers for another address is found for certain. `flip` is 0, or all
// ones for the inverse.
__device__ __forceinline__ uint4 pattern(u64 index, u32 key0, u32 key1, u32 flip)
{
    u32 left = (u32)index, right = (u32)(index >> 32);
    right ^= mix(left ^ key0);
    left ^= mix(right ^ key1);
    uint4 found;
    found.x = left ^ flip;
    found.y = right ^ flip;
    found.z = ((left ^ halves_swapped(right)) * 0x9e3779b1u + key1) ^ flip;
    found.w = ((right ^ halves_swapped(left)) * 0x85ebca77u + key0) ^ flip;
    return found;
}

__device__ __forceinline__ u32 unlike(uint4 a, uint4 b)
{
    return (a.x != b.x) + (a.y != b.y) + (a.z != b.z) + (a.w != b.w);
}

// Adds to counts[0] the words that were looked at, to counts[1] those that were unlike.
__device__ __forceinline__ void add_up(u64 vectors, u64 words, u64 *counts)
{
    __shared__ u64 looked, wrong;
    if (threadIdx.x == 0) {
        looked = 0;
        wrong = 0;
    }
    __syncthreads();
    if (vectors)
        atomicAdd(&looked, 4 * vectors);
    if (words)
        atomicAdd(&wrong, words);
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(counts, looked);
        if (wrong)
            atomicAdd(counts + 1, wrong);
    }
}

extern "C" __global__ void fill(uint4 *data, u64 vectors, u64 first, u32 key0, u32 key1, u32 flip)
{
    const u64 stride = (u64)gridDim.x * blockDim.x;
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; at + (UNROLL - 1) * stride < vectors; at += UNROLL * stride) {
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            __stcs(data + at + i * stride, pattern(first + at + i * stride, key0, key1, flip));
    }
    for (; at < vectors; at += stride)
        __stcs(data + at, pattern(first + at, key0, key1, flip));
}

extern "C" __global__ void unlike_pattern(
    const uint4 *data, u64 vectors, u64 first, u32 key0, u32 key1, u32 flip, u64 *counts)
{
    const u64 stride = (u64)gridDim.x * blockDim.x;
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 looked = 0, wrong = 0;
    for (; at + (UNROLL - 1) * stride < vectors; at += UNROLL * stride) {
        uint4 read[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            read[i] = __ldcs(data + at + i * stride);
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            wrong += unlike(read[i], pattern(first + at + i * stride, key0, key1, flip));
        looked += UNROLL;
    }
    for (; at < vectors; at += stride, looked++)
        wrong += unlike(__ldcs(data + at), pattern(first + at, key0, key1, flip));
    add_up(looked, wrong, counts);
}

extern "C" __global__ void unlike_word(const uint4 *data, u64 vectors, u32 word, u64 *counts)
{
    const uint4 wanted = make_uint4(word, word, word, word);
    const u64 stride = (u64)gridDim.x * blockDim.x;
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 looked = 0, wrong = 0;
    for (; at + (UNROLL - 1) * stride < vectors; at += UNROLL * stride) {
        uint4 read[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            read[i] = __ldcs(data + at + i * stride);
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            wrong += unlike(read[i], wanted);
        looked += UNROLL;
    }
    for (; at < vectors; at += stride, looked++)
        wrong += unlike(__ldcs(data + at), wanted);
    add_up(looked, wrong, counts);
}
