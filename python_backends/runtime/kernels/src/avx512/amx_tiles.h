// AMX: permission of the process, and the tiles of a thread.
#pragma once

namespace wicore {

// Asks Linux for the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM), once per process. False where the CPU or Linux has
// no AMX with int8 and bfloat16, or the environment variable WICORE_NO_AMX is set.
bool amx_available();

// While it lives, the calling thread's tiles are 0-3: sums of 16 rows by 16 columns; 4-5: 16 rows of `k_bytes` of the
// left factor; 6-7: k_bytes / 4 rows of 16 columns of the right one. k_bytes is at most 64.
class AmxTiles {
 public:
  explicit AmxTiles(int k_bytes);
  ~AmxTiles();
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

}  // namespace wicore
