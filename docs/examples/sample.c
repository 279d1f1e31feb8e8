/* Samples four images and writes them side by side: sample MODEL OUT.png [STEPS]
 *
 *   cc sample.c -o sample $(pkg-config --cflags --libs ddpm)
 */
#include <ddpm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COUNT = 4 };

/* A PNG needs no compressor: zlib's format may hold plain blocks of at most 65535 bytes. */

static uint32_t crc_of(uint32_t crc, const uint8_t* data, size_t size) {
  size_t i;
  int bit;
  crc = ~crc;
  for (i = 0; i < size; ++i)
    for (crc ^= data[i], bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
  return ~crc;
}

static void put32(uint8_t* to, uint32_t value) {
  to[0] = (uint8_t)(value >> 24);
  to[1] = (uint8_t)(value >> 16);
  to[2] = (uint8_t)(value >> 8);
  to[3] = (uint8_t)value;
}

static void write_chunk(FILE* file, const char* name, const uint8_t* data, size_t size) {
  uint8_t word[4];
  put32(word, (uint32_t)size);
  fwrite(word, 1, 4, file);
  fwrite(name, 1, 4, file);
  if (size > 0) fwrite(data, 1, size, file);
  put32(word, crc_of(crc_of(0, (const uint8_t*)name, 4), data, size));
  fwrite(word, 1, 4, file);
}

/* rows: `height` rows of a filter byte, 0, and the pixels. */
static size_t store(uint8_t* out, const uint8_t* rows, size_t size) {
  uint32_t a = 1, b = 0;
  size_t i, n = 2;
  out[0] = 0x78;
  out[1] = 0x01;
  for (i = 0; i < size; ++i) {
    if (i % 65535 == 0) {
      const size_t part = size - i < 65535 ? size - i : 65535;
      out[n++] = i + part == size;
      out[n++] = (uint8_t)part;
      out[n++] = (uint8_t)(part >> 8);
      out[n++] = (uint8_t)~part;
      out[n++] = (uint8_t)(~part >> 8);
    }
    out[n++] = rows[i];
    a = (a + rows[i]) % 65521;
    b = (b + a) % 65521;
  }
  put32(out + n, b << 16 | a);
  return n + 4;
}

/* images: (COUNT, height, width, channels). */
static int write_png(const char* path, const uint8_t* images, const ddpm_info* info) {
  static const uint8_t kColour[] = {0, 0, 4, 2, 6}; /* grey, grey and alpha, RGB, RGBA */
  const size_t h = (size_t)info->height, row = (size_t)info->width * (size_t)info->channels;
  const size_t size = h * (1 + COUNT * row);
  uint8_t header[13] = {0};
  uint8_t* rows = calloc(size, 1);
  uint8_t* stored = malloc(size + 16 + size / 65535 * 5);
  FILE* file = fopen(path, "wb");
  size_t y, i;
  int good;
  if (rows == NULL || stored == NULL || file == NULL || info->channels > 4) {
    if (file != NULL) fclose(file);
    free(rows);
    free(stored);
    return 0;
  }
  for (y = 0; y < h; ++y)
    for (i = 0; i < COUNT; ++i)
      memcpy(rows + y * (1 + COUNT * row) + 1 + i * row, images + (i * h + y) * row, row);
  put32(header, (uint32_t)(COUNT * info->width));
  put32(header + 4, (uint32_t)info->height);
  header[8] = 8;
  header[9] = kColour[info->channels];
  fwrite("\x89PNG\r\n\x1a\n", 1, 8, file);
  write_chunk(file, "IHDR", header, sizeof header);
  write_chunk(file, "IDAT", stored, store(stored, rows, size));
  write_chunk(file, "IEND", NULL, 0);
  good = !ferror(file);
  good = fclose(file) == 0 && good;
  free(rows);
  free(stored);
  return good;
}

int main(int argc, char** argv) {
  ddpm_model* model = NULL;
  ddpm_sampler* sampler = NULL;
  ddpm_sampler_options options = {0};
  ddpm_info info = {0};
  uint8_t* images = NULL;
  ddpm_status status;
  if (argc < 3) {
    fprintf(stderr, "usage: sample MODEL OUT.png [STEPS]\n");
    return DDPM_USAGE;
  }
  info.struct_size = sizeof info;
  options.struct_size = sizeof options;
  options.batch_size = COUNT;
  options.sampler = "ddim";
  options.steps = argc > 3 ? atoi(argv[3]) : 0;
  status = ddpm_model_load(argv[1], NULL, &model);
  if (status == DDPM_OK) status = ddpm_get_info(model, &info);
  if (status == DDPM_OK) status = ddpm_sampler_create(model, &options, &sampler);
  if (status == DDPM_OK) {
    images =
        malloc((size_t)COUNT * (size_t)info.height * (size_t)info.width * (size_t)info.channels);
    status = images == NULL ? DDPM_MEMORY : ddpm_sample(sampler, 0, 0, COUNT, images);
  }
  if (status != DDPM_OK) {
    fprintf(stderr, "%s: %s\n", ddpm_status_string(status), ddpm_last_error());
  } else if (!write_png(argv[2], images, &info)) {
    fprintf(stderr, "%s could not be written\n", argv[2]);
    status = DDPM_FILE;
  }
  free(images);
  ddpm_sampler_destroy(sampler);
  ddpm_model_destroy(model);
  return status;
}
