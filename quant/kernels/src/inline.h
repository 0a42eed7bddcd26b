// Inline: what the kernels need of the compiler beyond the standard.
#pragma once

#if defined(_MSC_VER)
#define LM_INLINE __forceinline
#define LM_INLINE_LAMBDA
#define LM_UNROLL
#else
#define LM_INLINE inline __attribute__((always_inline))
#define LM_INLINE_LAMBDA __attribute__((always_inline))
#define LM_UNROLL _Pragma("GCC unroll 8")
#endif
