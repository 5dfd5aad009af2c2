#include "avx512/amx_tiles.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

namespace wicore {
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // the XSAVE component of the tile registers

bool request_amx() {
  if (std::getenv("WICORE_NO_AMX")) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return (edx & wanted) == wanted && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Intel SDM volume 1, table 18-1.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace

bool amx_available() {
  static const bool available = request_amx();
  return available;
}

AmxTiles::AmxTiles(int k_bytes) {
  TileConfig config;
  config.bytes_per_row[4] = config.bytes_per_row[5] = static_cast<uint16_t>(k_bytes);
  config.rows[6] = config.rows[7] = static_cast<uint8_t>(k_bytes / 4);
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 believes that the instruction reads eight bytes only
  _tile_loadconfig(&config);
}

AmxTiles::~AmxTiles() { _tile_release(); }

}  // namespace wicore
