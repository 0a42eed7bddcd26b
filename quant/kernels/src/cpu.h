// Cpu: what the processor can run and the system lets it run. All false on other families.
#pragma once

namespace localmimo {

struct Cpu {
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // F, BW, DQ, VL and VNNI
  bool avx512_bf16 = false;  // and products of pairs of bf16
  bool pclmul = false;
};

const Cpu& cpu();

}  // namespace localmimo
