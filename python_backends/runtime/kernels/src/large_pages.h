// Memory for weights.
#pragma once

#include <cstdint>
#include <memory>

namespace wicore {

// Zeroed memory in large pages where the system has them: a decode step reads all weights once, and with small pages a
// quarter of the bandwidth goes to address translation. Several pieces share a mapping, so that small matrices get
// large pages too; a mapping goes when its last piece does. Thread-safe; throws std::bad_alloc.
std::shared_ptr<uint8_t> large_pages(int64_t bytes);

}  // namespace wicore
