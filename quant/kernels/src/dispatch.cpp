#include "dispatch.h"

#include <atomic>

#include "cpu.h"

namespace localmimo {
namespace {

std::vector<const Kernels*> candidates() {
  std::vector<const Kernels*> out;
  if (cpu().avx512_bf16 && avx512_bf16_kernels()) out.push_back(avx512_bf16_kernels());
  if (cpu().avx512 && avx512_kernels()) out.push_back(avx512_kernels());
  if (cpu().avx2 && avx2_kernels()) out.push_back(avx2_kernels());
  out.push_back(portable_kernels());
  return out;
}

const std::vector<const Kernels*>& all() {
  static const std::vector<const Kernels*> found = candidates();
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{all().front()};
  return chosen;
}

}  // namespace

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const Kernels* k : all()) names.emplace_back(k->name);
  return names;
}

const Kernels& kernels() { return *current().load(); }

bool force(const std::string& name) {
  for (const Kernels* k : all())
    if (name.empty() || name == k->name) {
      current() = k;
      return true;
    }
  return false;
}

}  // namespace localmimo
