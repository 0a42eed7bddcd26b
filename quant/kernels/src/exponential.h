// exp over a policy V (see product.h): Cody-Waite reduction and a polynomial, the same bits on every machine.
#pragma once
#include "inline.h"

namespace localmimo {
namespace {

template <class V>
LM_INLINE typename V::F exponential(typename V::F x) {
  x = V::clamp(x, -87.0f, 88.0f);
  const typename V::F n = V::rint(V::mul(x, V::set1(1.44269504f)));
  typename V::F r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  typename V::F p = V::set1(1.0f / 5040);  // Taylor to x^7: |r| <= 0.35 leaves 6e-9
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = V::fma(p, r, V::set1(c));
  return V::scale_by_power(p, n);
}

}  // namespace
}  // namespace localmimo
