// AVX-512 with VNNI.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#include "avx512.h"

namespace localmimo {
namespace {

constexpr Kernels kKernels = kernels_of<Avx512>("avx512-vnni");

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace localmimo
#else
namespace localmimo {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace localmimo
#endif
