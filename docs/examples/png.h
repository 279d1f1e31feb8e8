/* Images side by side as a PNG in memory, for the examples; C99 and C++.
 *
 * A PNG needs no compressor: zlib's format may hold plain blocks of at most 65535 bytes. */
#ifndef DDPM_EXAMPLES_PNG_H_
#define DDPM_EXAMPLES_PNG_H_

#include <ddpm.h>
#include <stdlib.h>
#include <string.h>

static inline uint8_t* png_put32(uint8_t* to, uint32_t value) {
  to[0] = (uint8_t)(value >> 24);
  to[1] = (uint8_t)(value >> 16);
  to[2] = (uint8_t)(value >> 8);
  to[3] = (uint8_t)value;
  return to + 4;
}

static inline uint32_t png_crc(const uint8_t* data, size_t size) {
  uint32_t crc = ~(uint32_t)0;
  size_t i;
  int bit;
  for (i = 0; i < size; ++i)
    for (crc ^= data[i], bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
  return ~crc;
}

/* Length, name, `size` bytes that lie at `to + 8` already, and their sum. Returns its end. */
static inline uint8_t* png_chunk(uint8_t* to, const char* name, size_t size) {
  png_put32(to, (uint32_t)size);
  memcpy(to + 4, name, 4);
  return png_put32(to + 8 + size, png_crc(to + 4, size + 4));
}

/* As one zlib stream. Returns its end. */
static inline uint8_t* png_store(uint8_t* to, const uint8_t* data, size_t size) {
  uint32_t a = 1, b = 0;
  size_t i;
  *to++ = 0x78;
  *to++ = 0x01;
  for (i = 0; i < size; ++i) {
    if (i % 65535 == 0) {
      const size_t part = size - i < 65535 ? size - i : 65535;
      *to++ = i + part == size;
      *to++ = (uint8_t)part;
      *to++ = (uint8_t)(part >> 8);
      *to++ = (uint8_t)~part;
      *to++ = (uint8_t)(~part >> 8);
    }
    *to++ = data[i];
    a = (a + data[i]) % 65521;
    b = (b + a) % 65521;
  }
  return png_put32(to, b << 16 | a);
}

/* images: (n, height, width, channels), n > 0. NULL: no memory, or more than four channels. The
 * result is the caller's to free(). */
static inline uint8_t* png_of(const uint8_t* images, size_t n, const ddpm_info* info,
                              size_t* size) {
  static const uint8_t kColour[] = {0, 0, 4, 2, 6}; /* grey, grey and alpha, RGB, RGBA */
  const size_t h = (size_t)info->height, row = (size_t)info->width * (size_t)info->channels;
  const size_t line = 1 + n * row, raw = h * line; /* a line begins with its filter: 0, none */
  uint8_t *lines, *png, *at;
  size_t y, i;
  if (info->channels > 4) return NULL;
  lines = (uint8_t*)calloc(raw, 1);
  png = (uint8_t*)malloc(raw + raw / 65535 * 5 + 128);
  if (lines == NULL || png == NULL) {
    free(lines);
    free(png);
    return NULL;
  }
  for (y = 0; y < h; ++y)
    for (i = 0; i < n; ++i) memcpy(lines + y * line + 1 + i * row, images + (i * h + y) * row, row);
  memcpy(png, "\x89PNG\r\n\x1a\n", 8);
  at = png + 8;
  memset(at + 8, 0, 13);
  png_put32(at + 8, (uint32_t)(n * (size_t)info->width));
  png_put32(at + 12, (uint32_t)info->height);
  at[16] = 8;
  at[17] = kColour[info->channels];
  at = png_chunk(at, "IHDR", 13);
  at = png_chunk(at, "IDAT", (size_t)(png_store(at + 8, lines, raw) - (at + 8)));
  at = png_chunk(at, "IEND", 0);
  *size = (size_t)(at - png);
  free(lines);
  return png;
}

#endif /* DDPM_EXAMPLES_PNG_H_ */
