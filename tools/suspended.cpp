#include "tools/suspended.h"

#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>

#include "engine/file_io.h"
#include "engine/safetensors.h"
#include "tools/common.h"

namespace ddpm::tools {
namespace {

constexpr const char* kFormat = "ddpm suspended sampling 2";
using Metadata = std::map<std::string, std::string>;

// The floats of a row, in the order they are written.
std::array<float SamplerRow::*, 10> row_fields() {
  return {&SamplerRow::x0_x,  &SamplerRow::x0_out, &SamplerRow::clip,       &SamplerRow::x_x,
          &SamplerRow::x_x0,  &SamplerRow::x_out,  &SamplerRow::x_previous, &SamplerRow::x_z,
          &SamplerRow::z_log, &SamplerRow::z_out};
}

std::string checksum_of(const Metadata& metadata, const Metadata& tensor_hashes) {
  std::string text;
  for (const Metadata* part : {&metadata, &tensor_hashes})
    for (const auto& [key, value] : *part)
      if (key != "checksum") text += key + "=" + value + "\n";
  return hash_of(text);
}

// Tensors and their data, until they are written.
class Writer {
 public:
  explicit Writer(const Shape& image) : image_(image) {}

  // (N,H,W,C); nothing where it is empty
  void images(const char* name, const std::vector<float>& nhwc) {
    if (nhwc.empty()) return;
    const uint64_t size = static_cast<uint64_t>(image_.count());
    const uint64_t n = nhwc.size() / size;
    add(name, DType::kF32, {n, extent(image_.c), extent(image_.h), extent(image_.w)},
        to_nchw(nhwc, static_cast<int>(n), image_.h, image_.w, image_.c));
  }
  template <typename T>
  void add(const char* name, DType type, std::vector<uint64_t> shape, const std::vector<T>& data) {
    const auto* bytes = reinterpret_cast<const char*>(data.data());
    data_[name].assign(bytes, bytes + data.size() * sizeof(T));
    hashes_[name] = hash_of(data_[name]);
    tensors_.push_back(tensor_in_memory(name, type, std::move(shape), data_[name].data()));
  }
  void write(const std::string& path, Metadata metadata) {
    metadata["checksum"] = checksum_of(metadata, hashes_);
    OutputFile file(path);
    write_safetensors(file, std::move(tensors_), metadata);
    file.commit();
  }

 private:
  static uint64_t extent(int v) { return static_cast<uint64_t>(v); }

  Shape image_;
  std::map<std::string, std::string> data_;
  Metadata hashes_;
  std::vector<TensorSource> tensors_;
};

class Reader {
 public:
  Reader(const std::string& path, const Shape& image)
      : file_(path, Status::kConfig), image_(image) {
    const Metadata& m = file_.metadata();
    if (const auto it = m.find("kind"); it == m.end() || it->second != kFormat)
      fail(Status::kConfig, "%s was not written by ddpm sample --suspend", path.c_str());
    Metadata hashes;
    for (const TensorInfo& t : file_.tensors()) hashes[t.name] = file_.hash(t);
    if (text("checksum") != checksum_of(m, hashes)) damaged("does not have its own checksum");
  }

  [[noreturn]] void damaged(const char* what) const {
    fail(Status::kFile, "%s %s: it is damaged; sample anew", file_.path().c_str(), what);
  }
  std::string text(const char* key) const {
    const auto it = file_.metadata().find(key);
    if (it == file_.metadata().end()) damaged("is incomplete");
    return it->second;
  }
  uint64_t number(const char* key, uint64_t least, uint64_t most) const {
    const std::string digits = text(key);
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size() || value < least ||
        value > most)
      damaged("has a number out of range");
    return value;
  }
  std::vector<float> images(const char* name, int64_t count) const {
    if (count == 0) return {};
    const TensorInfo& t = need(name, "F32", static_cast<size_t>(count * image_.count()));
    std::vector<float> v(t.elements);
    file_.read_f32(t, v.data());
    for (const float x : v)
      if (!std::isfinite(x)) damaged("holds values that are not finite");
    return to_nhwc(v, static_cast<int>(count), image_.h, image_.w, image_.c);
  }
  std::vector<int32_t> indices(const char* name, size_t count, int limit) const {
    const TensorInfo& t = need(name, "I64", count);
    std::vector<int64_t> v(count);
    file_.read(t, v.data());
    for (const int64_t i : v)
      if (i < 0 || i >= limit) damaged("has an index out of range");
    return {v.begin(), v.end()};
  }
  std::vector<SamplerRow> rows(size_t count, int timesteps) const {
    std::vector<SamplerRow> rows(count);
    const std::vector<int32_t> t = indices("row_timesteps", count, timesteps);
    std::vector<float> v(count * row_fields().size());
    file_.read_f32(need("rows", "F32", v.size()), v.data());
    for (size_t i = 0; i < count; ++i) {
      rows[i].t = t[i];
      for (size_t k = 0; k < row_fields().size(); ++k)
        rows[i].*row_fields()[k] = v[i * row_fields().size() + k];
    }
    return rows;
  }

 private:
  const TensorInfo& need(const char* name, const char* dtype, size_t elements) const {
    const TensorInfo* t = file_.find(name);
    if (t == nullptr || t->dtype != dtype || t->elements != elements) damaged("is incomplete");
    return *t;
  }

  SafetensorsReader file_;
  Shape image_;
};

}  // namespace

void write_sampling(const std::string& path, const Sampling& s, const Shape& image) {
  Writer writer(image);
  writer.images("x", s.x);
  writer.images("previous", s.previous);
  writer.images("images", s.images);
  writer.images("starts", s.starts);
  if (!s.labels.empty())
    writer.add("labels", DType::kI64, {s.labels.size()},
               std::vector<int64_t>(s.labels.begin(), s.labels.end()));
  std::vector<int64_t> timesteps;
  std::vector<float> rows;
  for (const SamplerRow& row : s.rows) {
    timesteps.push_back(row.t);
    for (const auto field : row_fields()) rows.push_back(row.*field);
  }
  writer.add("rows", DType::kF32, {s.rows.size(), row_fields().size()}, rows);
  writer.add("row_timesteps", DType::kI64, {s.rows.size()}, timesteps);
  const auto text = [](auto number) { return std::to_string(number); };
  writer.write(path, {{"kind", kFormat},
                      {"model", s.model},
                      {"numerics", s.numerics},
                      {"sampler", s.sampler},
                      {"output", s.latents ? "x_T" : "images"},
                      {"seed", text(s.seed)},
                      {"first", text(s.first)},
                      {"num", text(s.num)},
                      {"batch_size", text(s.batch_size)},
                      {"guidance_bits", text(std::bit_cast<uint32_t>(s.guidance))},
                      {"row_count", text(s.rows.size())},
                      {"images_done", text(s.images_done)},
                      {"steps_done", text(s.steps_done)},
                      {"starts_given", s.starts.empty() ? "0" : "1"}});
}

Sampling read_sampling(const std::string& path, const Pipeline& p) {
  const UNetConfig& u = p.unet;
  const Shape image{1, u.sample_height, u.sample_width, u.in_channels};
  const Reader file(path, image);
  Sampling s;
  s.model = file.text("model");
  if (const std::string own = model_hash(p); s.model != own)
    fail(Status::kConfig,
         "%s was begun with another model (hash %s; %s has %s): give the same --model",
         path.c_str(), s.model.c_str(), p.folder.c_str(), own.c_str());
  constexpr uint64_t kMost = uint64_t{1} << 40, kMostRows = 100000;
  s.numerics = file.text("numerics");
  s.sampler = file.text("sampler");
  s.latents = file.text("output") == "x_T";
  s.seed = file.number("seed", 0, std::numeric_limits<uint64_t>::max());
  s.first = file.number("first", 0, std::numeric_limits<uint64_t>::max());
  s.num = static_cast<int64_t>(file.number("num", 1, kMost));
  s.batch_size = static_cast<int>(file.number("batch_size", 1, 1 << 20));
  s.guidance = std::bit_cast<float>(
      static_cast<uint32_t>(file.number("guidance_bits", 0, std::numeric_limits<uint32_t>::max())));
  if (!std::isfinite(s.guidance) || (s.guidance != 1 && !u.null_class))
    file.damaged("has a guidance that its model cannot have");
  const size_t rows = file.number("row_count", 1, kMostRows);
  s.rows = file.rows(rows, p.scheduler.num_train_timesteps);
  s.images_done =
      static_cast<int64_t>(file.number("images_done", 0, static_cast<uint64_t>(s.num) - 1));
  s.steps_done = static_cast<int>(file.number("steps_done", 0, rows - 1));
  if (u.num_class_embeds)
    s.labels = file.indices("labels", static_cast<size_t>(s.num), *u.num_class_embeds);
  s.images = file.images("images", s.images_done);
  const int64_t now = s.steps_done > 0 ? s.batch() : 0;
  s.x = file.images("x", now);
  if (s.rows[static_cast<size_t>(s.steps_done)].x_previous != 0)
    s.previous = file.images("previous", now);
  if (file.number("starts_given", 0, 1) == 1)
    s.starts = file.images("starts", s.num - s.images_done - now);
  return s;
}

}  // namespace ddpm::tools
