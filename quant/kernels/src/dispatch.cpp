#include "dispatch.h"

#include <atomic>

#include "cpu.h"

namespace localmimo {

// Each of its isa_*.cpp; null where that file was built for another CPU family.
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

namespace {

std::vector<const Kernels*> candidates() {
  std::vector<const Kernels*> out;
  const auto offer = [&out](bool runs, const Kernels* (*table)()) {
    if (runs && table()) out.push_back(table());
  };
  offer(cpu().avx512_bf16, avx512_bf16_kernels);
  offer(cpu().avx512, avx512_kernels);
  offer(cpu().avx2, avx2_kernels);
  offer(true, portable_kernels);
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
