#include "tools/event_file.h"

#include <array>
#include <bit>
#include <cstring>

namespace ddpm::tools {
namespace {

// Fields of the messages Event, SessionLog, Summary and Summary.Value.
enum EventField { kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5, kSessionLog = 7 };
enum SessionLogField { kStatus = 1 };
enum SummaryField { kValue = 1 };
enum ValueField { kTag = 1, kSimpleValue = 2 };
constexpr uint64_t kSessionStart = 1;

enum WireType { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void put_varint(std::string& to, uint64_t v) {
  for (; v >= 0x80; v >>= 7) to += static_cast<char>(v | 0x80);
  to += static_cast<char>(v);
}
void put_key(std::string& to, int field, WireType type) {
  put_varint(to, static_cast<uint64_t>(field) << 3 | type);
}
// Little-endian, as everything here.
template <typename T>
void put_fixed(std::string& to, T v) {
  static_assert(std::endian::native == std::endian::little);
  char bytes[sizeof v];
  std::memcpy(bytes, &v, sizeof v);
  to.append(bytes, sizeof v);
}
void put_integer(std::string& to, int field, uint64_t v) {
  put_key(to, field, kVarint);
  put_varint(to, v);
}
void put_bytes(std::string& to, int field, const std::string& bytes) {
  put_key(to, field, kBytes);
  put_varint(to, bytes.size());
  to += bytes;
}

std::string event_at(double wall_time, uint64_t step) {
  std::string event;
  put_key(event, kWallTime, kFixed64);
  put_fixed(event, wall_time);
  if (step > 0) put_integer(event, kStep, step);
  return event;
}

// Rotated and offset, so that a checksum of data with checksums in it is none of its own.
uint32_t masked_crc(const std::string& bytes) { return std::rotr(crc32c(bytes), 15) + 0xa282ead8u; }

// Length and message, each with its checksum.
void append_record(AppendFile& file, const std::string& message) {
  std::string length;
  put_fixed(length, uint64_t{message.size()});
  std::string record = length;
  put_fixed(record, masked_crc(length));
  record += message;
  put_fixed(record, masked_crc(message));
  file.append(record);
}

}  // namespace

uint32_t crc32c(const std::string& bytes) {
  static constexpr auto kTable = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t v = i;
      for (int bit = 0; bit < 8; ++bit) v = (v & 1) != 0 ? v >> 1 ^ 0x82f63b78u : v >> 1;
      table[i] = v;
    }
    return table;
  }();
  uint32_t crc = ~0u;
  for (char c : bytes) crc = kTable[(crc ^ static_cast<uint8_t>(c)) & 0xff] ^ crc >> 8;
  return ~crc;
}

EventFile::EventFile(const std::string& path, double wall_time, uint64_t first_step) : file_(path) {
  std::string version = event_at(wall_time, 0);
  put_bytes(version, kFileVersion, "brain.Event:2");
  append_record(file_, version);
  std::string log, start = event_at(wall_time, first_step);
  put_integer(log, kStatus, kSessionStart);
  put_bytes(start, kSessionLog, log);
  append_record(file_, start);
}

void EventFile::add(double wall_time, uint64_t step, const std::vector<Scalar>& scalars) {
  std::string summary;
  for (const auto& [tag, number] : scalars) {
    std::string value;
    put_bytes(value, kTag, tag);
    put_key(value, kSimpleValue, kFixed32);
    put_fixed(value, static_cast<float>(number));
    put_bytes(summary, kValue, value);
  }
  std::string event = event_at(wall_time, step);
  put_bytes(event, kSummary, summary);
  append_record(file_, event);
}

}  // namespace ddpm::tools
