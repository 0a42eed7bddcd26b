// Crc32: the checksum of zlib (polynomial 0xEDB88320), by carry-less multiplication where the CPU has it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace localmimo {

uint32_t crc32(uint32_t value, const uint8_t* data, size_t n);
// The same without special instructions; a test compares the two.
uint32_t crc32_plain(uint32_t value, const uint8_t* data, size_t n);

}  // namespace localmimo
