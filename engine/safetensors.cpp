#include "engine/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <tuple>
#include <utility>

#include "engine/json.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ddpm {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr size_t kMaxHeader = size_t{16} << 20;
constexpr size_t kMaxTensors = 65536;
constexpr size_t kMaxMetadata = 65536;
constexpr size_t kMaxName = 256;
constexpr size_t kMaxRank = 8;
constexpr size_t kChunk = size_t{1} << 20;
constexpr const char* kMetadataKey = "__metadata__";

// Every type of the format, in its own order: by width, which is the order of alignment in a file.
struct StoredType {
  std::string_view name;
  unsigned bits;
  bool readable;
};
constexpr std::array<StoredType, 22> kStoredTypes = {{
    {"BOOL", 8, false},        {"F4", 4, false},          {"F6_E2M3", 6, false},
    {"F6_E3M2", 6, false},     {"U8", 8, true},           {"I8", 8, false},
    {"F8_E5M2", 8, false},     {"F8_E4M3", 8, false},     {"F8_E8M0", 8, false},
    {"F8_E4M3FNUZ", 8, false}, {"F8_E5M2FNUZ", 8, false}, {"I16", 16, false},
    {"U16", 16, false},        {"F16", 16, true},         {"BF16", 16, true},
    {"I32", 32, true},         {"U32", 32, false},        {"F32", 32, true},
    {"C64", 64, false},        {"F64", 64, true},         {"I64", 64, true},
    {"U64", 64, false},
}};

const StoredType* stored_type(std::string_view name) {
  for (const StoredType& type : kStoredTypes)
    if (type.name == name) return &type;
  return nullptr;
}

// Why `name` cannot name a tensor, or null. It is a key and never a path; what looks like one, or
// would garble a message, is refused. Invalid UTF-8 does not reach this.
const char* name_fault(std::string_view name) {
  if (name.empty() || name.size() > kMaxName) return "has not 1 to 256 bytes";
  for (size_t i = 0; i < name.size(); ++i) {
    const auto c = static_cast<unsigned char>(name[i]);
    const bool c1 =
        c == 0xC2 && i + 1 < name.size() && static_cast<unsigned char>(name[i + 1]) < 0xA0;
    if (c < 0x20 || c == 0x7f || c1) return "holds a control character";
  }
  if (name.find_first_of("/\\") != std::string_view::npos ||
      name.find("..") != std::string_view::npos)
    return "looks like a path";
  return nullptr;
}

// Reads the header's JSON, whose grammar nests three deep at most. Offsets are left relative to the
// data; what needs other tensors or the file's size is checked by the reader.
class HeaderVisitor : public JsonVisitor {
 public:
  std::vector<TensorInfo> tensors;
  std::map<std::string, std::string> metadata;

  void null() override { reject("null where " + expected()); }
  void boolean(bool) override { reject("true or false where " + expected()); }
  void negative(int64_t) override { reject("a negative number where " + expected()); }
  void real(double) override { reject("a number with a point or exponent where " + expected()); }
  void integer(uint64_t value) override;
  void string(std::string& value) override;
  void start_object() override;
  void key(std::string& name) override;
  void end_object() override;
  void start_array() override;
  void end_array() override;

 private:
  enum class At {
    kStart,
    kTop,
    kEntry,
    kTensor,
    kDtype,
    kShape,
    kDims,
    kOffsets,
    kEnds,
    kMetadata,
    kText
  };
  enum Field : unsigned { kHasDtype = 1, kHasShape = 2, kHasOffsets = 4, kHasAll = 7 };

  std::string expected() const;
  void finish_tensor();

  At at_ = At::kStart;
  bool has_metadata_ = false;
  unsigned fields_ = 0;
  unsigned bits_ = 0;  // per element
  std::vector<uint64_t> ends_;
  std::string metadata_key_;
};

std::string HeaderVisitor::expected() const {
  const std::string tensor = tensors.empty() ? "" : " of tensor " + in_quotes(tensors.back().name);
  switch (at_) {
    case At::kStart:
    case At::kTop:
      return "an object is expected";
    case At::kEntry:
    case At::kTensor:
      return "the object" + tensor + " is expected";
    case At::kDtype:
      return "the dtype" + tensor + ", a string, is expected";
    case At::kShape:
    case At::kDims:
      return "the shape" + tensor + ", a list of unsigned integers, is expected";
    case At::kOffsets:
    case At::kEnds:
      return "the data_offsets" + tensor + ", two unsigned integers, are expected";
    case At::kMetadata:
      return std::string("the object of ") + kMetadataKey + " is expected";
    case At::kText:
      return "the string of " + in_quotes(metadata_key_) + " in " + kMetadataKey + " is expected";
  }
  return {};
}

void HeaderVisitor::integer(uint64_t value) {
  if (at_ == At::kDims) {
    std::vector<uint64_t>& shape = tensors.back().shape;
    if (shape.size() == kMaxRank) reject("more than 8 dimensions where " + expected());
    shape.push_back(value);
  } else if (at_ == At::kEnds) {
    if (ends_.size() == 2) reject("a third number where " + expected());
    ends_.push_back(value);
  } else {
    reject("a number where " + expected());
  }
}

void HeaderVisitor::string(std::string& value) {
  if (at_ == At::kDtype) {
    const StoredType* type = stored_type(value);
    if (type == nullptr)
      reject("tensor " + in_quotes(tensors.back().name) + " has the unknown dtype " +
             in_quotes(value));
    tensors.back().dtype = type->name;
    bits_ = type->bits;
    at_ = At::kTensor;
  } else if (at_ == At::kText) {
    metadata.emplace(std::move(metadata_key_), std::move(value));
    at_ = At::kMetadata;
  } else {
    reject("a string where " + expected());
  }
}

void HeaderVisitor::start_object() {
  if (at_ == At::kStart) {
    at_ = At::kTop;
  } else if (at_ == At::kEntry) {
    at_ = At::kTensor;
    fields_ = 0;
    ends_.clear();
  } else if (at_ != At::kMetadata) {
    reject("an object where " + expected());
  }
}

void HeaderVisitor::key(std::string& name) {
  if (at_ == At::kTop && name == kMetadataKey) {
    if (std::exchange(has_metadata_, true)) reject("__metadata__ stands twice");
    at_ = At::kMetadata;
  } else if (at_ == At::kTop) {
    if (const char* fault = name_fault(name))
      reject("the tensor name " + in_quotes(name) + " " + fault);
    if (tensors.size() == kMaxTensors) reject(format("more than %zu tensors", kMaxTensors));
    tensors.emplace_back().name = std::move(name);
    at_ = At::kEntry;
  } else if (at_ == At::kMetadata) {
    if (metadata.count(name) > 0) reject("the key " + in_quotes(name) + " stands twice");
    if (metadata.size() == kMaxMetadata)
      reject(format("more than %zu entries in %s", kMaxMetadata, kMetadataKey));
    metadata_key_ = std::move(name);
    at_ = At::kText;
  } else {
    unsigned field = 0;
    if (name == "dtype") field = kHasDtype, at_ = At::kDtype;
    if (name == "shape") field = kHasShape, at_ = At::kShape;
    if (name == "data_offsets") field = kHasOffsets, at_ = At::kOffsets;
    const std::string where = in_quotes(name) + " of tensor " + in_quotes(tensors.back().name);
    if (field == 0) reject("unknown field " + where);
    if (fields_ & field) reject(where + " stands twice");
    fields_ |= field;
  }
}

void HeaderVisitor::start_array() {
  if (at_ == At::kShape)
    at_ = At::kDims;
  else if (at_ == At::kOffsets)
    at_ = At::kEnds;
  else
    reject("a list where " + expected());
}

void HeaderVisitor::end_array() { at_ = At::kTensor; }

void HeaderVisitor::end_object() {
  if (at_ == At::kTensor) finish_tensor();
  at_ = At::kTop;
}

void HeaderVisitor::finish_tensor() {
  TensorInfo& tensor = tensors.back();
  const std::string name = "tensor " + in_quotes(tensor.name);
  if (fields_ != kHasAll) reject(name + " lacks dtype, shape or data_offsets");
  if (ends_.size() != 2) reject(name + " has not two data_offsets");
  if (ends_[1] < ends_[0]) reject(name + " ends before it begins");
  tensor.elements = 1;
  bool overflow = false;
  for (const uint64_t dim : tensor.shape)
    overflow |= __builtin_mul_overflow(tensor.elements, dim, &tensor.elements);
  uint64_t bits = 0;
  overflow |= __builtin_mul_overflow(tensor.elements, bits_, &bits);
  if (overflow) reject(name + " has a shape too large for any file");
  tensor.offset = ends_[0];
  tensor.bytes = ends_[1] - ends_[0];
  if (bits % 8 != 0 || tensor.bytes != bits / 8)
    reject(format("%s: its shape needs %llu bits, its data_offsets hold %llu bytes", name.c_str(),
                  static_cast<unsigned long long>(bits),
                  static_cast<unsigned long long>(tensor.bytes)));
}

[[noreturn]] void fail_file(const std::string& path, const std::string& reason) {
  fail(Status::kFile, "'%s' is not a usable safetensors file: %s; copy or download it again",
       path.c_str(), reason.c_str());
}

// Files of other kinds that are often taken for safetensors, told by their first bytes. A sound
// file may begin with the same bytes, so this is asked only once the header was found wrong.
void fail_if_other_kind(const std::string& path, std::string_view first) {
  using namespace std::string_view_literals;
  if (first.starts_with("PK\3\4"sv) ||
      (first.starts_with("\x80"sv) && first.size() > 1 && first[1] >= 2 && first[1] <= 5))
    fail(
        Status::kFile,
        "'%s' is a PyTorch pickle (.bin, .pt, .ckpt), which could run code and is never read; "
        "convert it in Python: safetensors.torch.save_file(torch.load(IN, weights_only=True), OUT)",
        path.c_str());
  if (first.starts_with("version "sv))
    fail(Status::kFile, "'%s' is a Git LFS pointer, not the file itself; run git lfs pull there",
         path.c_str());
}

// The header's JSON text, its padding removed; it starts at byte 8 of the file.
std::string read_header(const InputFile& file, uint64_t& length) {
  char first[16] = {};
  const size_t available = static_cast<size_t>(std::min<uint64_t>(file.size(), sizeof first));
  file.read(0, first, available);
  const auto check = [&](bool sound, const std::string& reason) {
    if (sound) return;
    fail_if_other_kind(file.path(), {first, available});
    fail_file(file.path(), reason);
  };
  check(file.size() >= 8,
        format("%llu bytes are too few", static_cast<unsigned long long>(file.size())));
  std::memcpy(&length, first, 8);
  const auto shown = static_cast<unsigned long long>(length);
  check(length >= 2 && length <= kMaxHeader,
        format("a header of %llu bytes is not between 2 and %zu", shown, kMaxHeader));
  check(length <= file.size() - 8,
        format("its header of %llu bytes goes beyond the file's end", shown));
  check(first[8] == '{', "its header does not start with '{'");

  std::string header(static_cast<size_t>(length), '\0');
  file.read(8, header.data(), header.size());
  header.resize(header.find_last_not_of(' ') + 1);
  return header;
}

// The tensors' data must fill [0, `size`) without a hole or an overlap.
void check_layout(const std::string& path, const std::vector<TensorInfo>& tensors, uint64_t size) {
  uint64_t end = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.offset != end)
      fail_file(path, format("tensor %s begins at byte %llu of the data, but %llu is next",
                             in_quotes(tensor.name).c_str(),
                             static_cast<unsigned long long>(tensor.offset),
                             static_cast<unsigned long long>(end)));
    end += tensor.bytes;  // the second of its data_offsets: no overflow
    if (end > size)
      fail_file(path, format("tensor %s needs data up to byte %llu, but the file has %llu",
                             in_quotes(tensor.name).c_str(), static_cast<unsigned long long>(end),
                             static_cast<unsigned long long>(size)));
  }
  if (end != size)
    fail_file(path, format("%llu bytes stand behind its last tensor",
                           static_cast<unsigned long long>(size - end)));
}

float f32_of_f16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  const uint32_t fraction = half & 0x3FFu;
  if (exponent == 0)  // zero or subnormal: fraction * 2^-24 is exact
    return std::bit_cast<float>(sign |
                                std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
  const uint32_t wide = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

float f32_of_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

float f32_of_f64(double value) { return static_cast<float>(value); }

std::string hex(uint64_t hash) { return format("%016llx", static_cast<unsigned long long>(hash)); }

// Calls f(offset, bytes) over [0, bytes) in pieces of at most kChunk.
template <typename F>
void for_chunks(uint64_t bytes, F f) {
  for (uint64_t at = 0; at < bytes; at += kChunk)
    f(at, static_cast<size_t>(std::min<uint64_t>(kChunk, bytes - at)));
}

}  // namespace

SafetensorsReader::SafetensorsReader(const std::string& path, Status missing)
    : file_(path, missing) {
  read_contents();
}

SafetensorsReader::SafetensorsReader(const std::string& name, std::vector<uint8_t> bytes)
    : file_(name, std::move(bytes)) {
  read_contents();
}

void SafetensorsReader::read_contents() {
  const std::string& path = file_.path();
  uint64_t length = 0;
  {
    const std::string header = read_header(file_, length);
    HeaderVisitor visitor;
    visit_json(header, path, Status::kFile, visitor,
               {.bytes = kMaxHeader, .token_bytes = size_t{1} << 20, .depth = 8}, 8);
    tensors_ = std::move(visitor.tensors);
    metadata_ = std::move(visitor.metadata);
  }
  std::sort(tensors_.begin(), tensors_.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  const uint64_t data = 8 + length;
  check_layout(path, tensors_, file_.size() - data);
  for (TensorInfo& tensor : tensors_) tensor.offset += data;

  by_name_.resize(tensors_.size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  const auto name = [&](uint32_t i) -> const std::string& { return tensors_[i].name; };
  std::sort(by_name_.begin(), by_name_.end(),
            [&](uint32_t a, uint32_t b) { return name(a) < name(b); });
  for (size_t i = 1; i < by_name_.size(); ++i)
    if (name(by_name_[i - 1]) == name(by_name_[i]))
      fail_file(path, "tensor " + in_quotes(name(by_name_[i])) + " stands twice");
}

const TensorInfo* SafetensorsReader::find(std::string_view name) const {
  const auto it =
      std::lower_bound(by_name_.begin(), by_name_.end(), name,
                       [&](uint32_t i, std::string_view key) { return tensors_[i].name < key; });
  return it != by_name_.end() && tensors_[*it].name == name ? &tensors_[*it] : nullptr;
}

void SafetensorsReader::read(const TensorInfo& tensor, void* to) const {
  read(tensor, 0, static_cast<size_t>(tensor.bytes), to);
}

void SafetensorsReader::read(const TensorInfo& tensor, uint64_t begin, size_t bytes,
                             void* to) const {
  if (!stored_type(tensor.dtype)->readable)
    fail(Status::kFile,
         "'%s': tensor %s has dtype %s; F32, F64, F16, BF16, U8, I32 and I64 can be read: convert "
         "it",
         path().c_str(), in_quotes(tensor.name).c_str(), std::string(tensor.dtype).c_str());
  DDPM_CHECK(begin <= tensor.bytes && bytes <= tensor.bytes - begin, "read beyond tensor %s",
             tensor.name.c_str());
  file_.read(tensor.offset + begin, to, bytes);
}

void SafetensorsReader::read_f32(const TensorInfo& tensor, float* to) const {
  if (tensor.dtype == "F32") return read(tensor, to);
  std::vector<char> chunk(static_cast<size_t>(std::min<uint64_t>(kChunk, tensor.bytes)));
  const auto convert = [&](auto stored, auto f32_of) {
    for_chunks(tensor.bytes, [&](uint64_t at, size_t bytes) {
      read(tensor, at, bytes, chunk.data());
      for (size_t i = 0; i < bytes; i += sizeof stored) {
        std::memcpy(&stored, chunk.data() + i, sizeof stored);
        *to++ = f32_of(stored);
      }
    });
  };
  if (tensor.dtype == "F64")
    convert(double{}, f32_of_f64);
  else if (tensor.dtype == "F16")
    convert(uint16_t{}, f32_of_f16);
  else if (tensor.dtype == "BF16")
    convert(uint16_t{}, f32_of_bf16);
  else
    fail(Status::kFile, "'%s': tensor %s has dtype %s, but F32, F64, F16 or BF16 is needed",
         path().c_str(), in_quotes(tensor.name).c_str(), std::string(tensor.dtype).c_str());
}

std::string SafetensorsReader::hash(const TensorInfo& tensor) const {
  std::vector<char> chunk(static_cast<size_t>(std::min<uint64_t>(kChunk, tensor.bytes)));
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for_chunks(tensor.bytes, [&](uint64_t at, size_t bytes) {
    file_.read(tensor.offset + at, chunk.data(), bytes);
    XXH3_64bits_update(&state, chunk.data(), bytes);
  });
  return hex(XXH3_64bits_digest(&state));
}

TensorSource tensor_in_memory(std::string name, DType dtype, std::vector<uint64_t> shape,
                              const void* data) {
  return {std::move(name), dtype, std::move(shape),
          [data](uint64_t offset, void* to, size_t bytes) {
            std::memcpy(to, static_cast<const char*>(data) + offset, bytes);
          }};
}

namespace {

uint64_t bytes_of(const TensorSource& tensor) {
  uint64_t bytes = size_of(tensor.dtype);
  for (const uint64_t dim : tensor.shape)
    DDPM_CHECK(!__builtin_mul_overflow(bytes, dim, &bytes), "tensor %s is too large",
               tensor.name.c_str());
  return bytes;
}

std::string json_string(const std::string& text) { return nlohmann::json(text).dump(); }

std::string header_of(const std::vector<TensorSource>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  const auto start_entry = [&](const std::string& name) {
    text += (text.size() > 1 ? "," : "") + json_string(name) + ":{";
  };
  if (!metadata.empty()) {
    start_entry(kMetadataKey);
    for (const auto& [key, value] : metadata)
      text += (text.back() == '{' ? "" : ",") + json_string(key) + ":" + json_string(value);
    text += "}";
  }
  uint64_t begin = 0;
  for (const TensorSource& tensor : tensors) {
    DDPM_CHECK(name_fault(tensor.name) == nullptr && tensor.name != kMetadataKey &&
                   tensor.shape.size() <= kMaxRank,
               "tensor %s cannot be stored", in_quotes(tensor.name).c_str());
    start_entry(tensor.name);
    text += format("\"dtype\":\"%s\",\"shape\":[", name_of(tensor.dtype));
    for (const uint64_t dim : tensor.shape)
      text += (text.back() == '[' ? "" : ",") + std::to_string(dim);
    const uint64_t end = begin + bytes_of(tensor);
    text += "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
    begin = end;
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts at a multiple of 8
  DDPM_CHECK(text.size() <= kMaxHeader && tensors.size() <= kMaxTensors,
             "%zu tensors are too many for one file", tensors.size());
  return text;
}

}  // namespace

std::map<std::string, std::string> write_safetensors(
    OutputFile& file, std::vector<TensorSource> tensors,
    const std::map<std::string, std::string>& metadata) {
  // Widest first, so that every tensor is aligned in the file; then by name.
  const auto rank = [](const TensorSource& t) { return stored_type(name_of(t.dtype)); };
  std::sort(tensors.begin(), tensors.end(), [&](const TensorSource& a, const TensorSource& b) {
    return rank(a) != rank(b) ? rank(a) > rank(b) : a.name < b.name;
  });
  const std::string header = header_of(tensors, metadata);
  const uint64_t length = header.size();
  file.write(&length, sizeof length);
  file.write(header);

  std::map<std::string, std::string> hashes;
  std::vector<char> chunk(kChunk);
  for (const TensorSource& tensor : tensors) {
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    for_chunks(bytes_of(tensor), [&](uint64_t at, size_t bytes) {
      tensor.read(at, chunk.data(), bytes);
      XXH3_64bits_update(&state, chunk.data(), bytes);
      file.write(chunk.data(), bytes);
    });
    DDPM_CHECK(hashes.emplace(tensor.name, hex(XXH3_64bits_digest(&state))).second,
               "tensor %s is given twice", tensor.name.c_str());
  }
  return hashes;
}

std::string hash_of(std::string_view bytes) { return hex(XXH3_64bits(bytes.data(), bytes.size())); }

}  // namespace ddpm
