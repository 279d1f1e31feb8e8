// The safetensors format: named tensors with shapes in one file, data only. The reader trusts
// nothing: every number of the header is checked against the file's size before it is used.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "engine/file_io.h"
#include "kernels/dtype.h"

namespace ddpm {

struct TensorInfo {
  std::string name;
  std::string_view dtype;  // as the file writes it, e.g. "F32"
  std::vector<uint64_t> shape;
  uint64_t elements = 0;
  uint64_t offset = 0;  // of its first byte in the file
  uint64_t bytes = 0;
};

class SafetensorsReader {
 public:
  // Error(kFile) for whatever is not a whole, consistent file; `missing` where there is none.
  explicit SafetensorsReader(const std::string& path, Status missing = Status::kFile);
  // A file's bytes, which messages call `name`.
  SafetensorsReader(const std::string& name, std::vector<uint8_t> bytes);

  const std::string& path() const { return file_.path(); }
  const std::vector<TensorInfo>& tensors() const { return tensors_; }  // in the order of the data
  const TensorInfo* find(std::string_view name) const;                 // null: not in the file
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // The stored bytes, whole or from byte `begin` on. F32 F64 F16 BF16 U8 I32 I64 only.
  void read(const TensorInfo& tensor, void* to) const;
  void read(const TensorInfo& tensor, uint64_t begin, size_t bytes, void* to) const;
  // The values of an F32, F64, F16 or BF16 tensor.
  void read_f32(const TensorInfo& tensor, float* to) const;
  // XXH3-64 of the stored bytes, as 16 hex digits.
  std::string hash(const TensorInfo& tensor) const;

 private:
  void read_contents();

  InputFile file_;
  std::vector<TensorInfo> tensors_;
  std::vector<uint32_t> by_name_;  // indices of tensors_
  std::map<std::string, std::string> metadata_;
};

struct TensorSource {
  std::string name;
  DType dtype;
  std::vector<uint64_t> shape;
  // Puts bytes [offset, offset + bytes) of the row-major data at `to`; called in rising order.
  std::function<void(uint64_t offset, void* to, size_t bytes)> read;
};

// A source whose data lies at `data` until it is written.
TensorSource tensor_in_memory(std::string name, DType dtype, std::vector<uint64_t> shape,
                              const void* data);

// Writes the whole file (the caller commits it) holding one chunk of data at a time, and returns
// each tensor's XXH3-64 as hash() does. Equal tensors give equal bytes, in whatever order they
// come.
std::map<std::string, std::string> write_safetensors(
    OutputFile& file, std::vector<TensorSource> tensors,
    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

// XXH3-64 of these bytes, as 16 hex digits.
std::string hash_of(std::string_view bytes);

}  // namespace ddpm
