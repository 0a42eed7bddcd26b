// Inline: what the kernels need of the compiler beyond the standard.
#pragma once

#if defined(_MSC_VER)
#define LM_INLINE __forceinline
#define LM_INLINE_LAMBDA
#else
#define LM_INLINE inline __attribute__((always_inline))
#define LM_INLINE_LAMBDA __attribute__((always_inline))
#endif
