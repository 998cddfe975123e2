#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "algorithm.h"

namespace myconv {
namespace {

// Of the calling thread, so that a caller who forces a row does not reach into others.
struct Flags {
  std::array<std::string, kDirections> forced;
  std::vector<std::string> excluded;
  bool flush_denormals = true;
  Recording* recording = nullptr;
};
thread_local Flags flags;

bool is_excluded(const char* name) {
  return std::find(flags.excluded.begin(), flags.excluded.end(), name) != flags.excluded.end();
}

// nullptr: the row takes it.
const char* reason_against(const AlgorithmTable& table, const Algorithm& row, const ConvShape& shape) {
  const bool last = &row == &table.rows[table.size - 1];
  if (!last && is_excluded(row.name)) return "excluded by myconv.flags";
  const char* reason = row.decline(shape);
  return reason || !row.yield ? reason : row.yield(shape);
}

template <typename Reason>
std::vector<std::pair<std::string, std::string>> each_row(const AlgorithmTable& table, const Reason& reason_of) {
  std::vector<std::pair<std::string, std::string>> rows;
  for (int i = 0; i < table.size; ++i) {
    const char* reason = reason_of(table.rows[i]);
    rows.emplace_back(table.rows[i].name, reason ? reason : "");
  }
  return rows;
}

}  // namespace

void force_algorithm(Direction direction, const char* name) {
  flags.forced[static_cast<int>(direction)] = name ? name : "";
}

const char* forced_algorithm(Direction direction) {
  const std::string& name = flags.forced[static_cast<int>(direction)];
  return name.empty() ? nullptr : name.c_str();
}

void exclude_algorithms(std::vector<std::string> names) { flags.excluded = std::move(names); }
const std::vector<std::string>& excluded_algorithms() { return flags.excluded; }

void set_flush_denormals(bool on) { flags.flush_denormals = on; }
bool flush_denormals() { return flags.flush_denormals; }

void record_into(Recording* recording) { flags.recording = recording; }
Recording* recording() { return flags.recording; }

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
  const Algorithm* row = first_fast(table, shape);
  return row ? *row : table.rows[table.size - 1];
}

const Algorithm* first_fast(const AlgorithmTable& table, const ConvShape& shape) {
  for (int i = 0; i < table.size - 1; ++i)
    if (!reason_against(table, table.rows[i], shape)) return &table.rows[i];
  return nullptr;
}

std::vector<std::pair<std::string, std::string>> reasons(const AlgorithmTable& table, const ConvShape& shape) {
  return each_row(table, [&](const Algorithm& row) { return reason_against(table, row, shape); });
}

std::vector<std::pair<std::string, std::string>> declines(const AlgorithmTable& table, const ConvShape& shape) {
  return each_row(table, [&](const Algorithm& row) { return row.decline(shape); });
}

}  // namespace myconv
