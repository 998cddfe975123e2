#include <c10/util/Exception.h>

#include <array>
#include <cstring>
#include <string>

#include "algorithm.h"

namespace myconv {
namespace {

// Of the calling thread, so that a test that forces a row does not reach into others.
thread_local std::array<std::string, kDirections> forced;

}  // namespace

void force_algorithm(Direction direction, const char* name) { forced[static_cast<int>(direction)] = name ? name : ""; }

const char* forced_algorithm(Direction direction) {
  const std::string& name = forced[static_cast<int>(direction)];
  return name.empty() ? nullptr : name.c_str();
}

const Algorithm& first_match(const AlgorithmTable& table, Direction direction, const ConvShape& shape) {
  if (const char* name = forced_algorithm(direction)) {
    for (int i = 0; i < table.size; ++i) {
      const Algorithm& row = table.rows[i];
      if (std::strcmp(row.name, name) != 0) continue;
      const char* reason = row.decline(shape);
      TORCH_CHECK(!reason, "algorithm '", name, "' was forced but declines this convolution: ", reason);
      return row;
    }
    TORCH_CHECK(false, "algorithm '", name, "' was forced but this device has no such row");
  }
  for (int i = 0; i < table.size - 1; ++i)
    if (!table.rows[i].decline(shape)) return table.rows[i];
  return table.rows[table.size - 1];
}

}  // namespace myconv
