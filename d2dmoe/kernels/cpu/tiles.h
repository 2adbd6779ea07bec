// What both kinds of tile products share, part of isa_amx.cpp and isa_amxint8.cpp and of a namespace there: sums of
// 16 x 16 in tiles 0 to 3, left operands in 4 and 5, right ones in 6 and 7.

constexpr int64_t SIDE = 16, BLOCK = 2 * SIDE;
constexpr int64_t LINE = 64;                                 // bytes: one row of a tile
constexpr int64_t FEWEST = 8;                                // tokens of an expert that pay for filling tiles
constexpr int64_t HIDDEN = 512 * 1024, OUTPUT = 256 * 1024;  // bytes kept in the second cache

inline int64_t tiles(int64_t n, int64_t of) { return (n + of - 1) / of; }

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void no_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Calls `part` with the tiles, 1 or 2, that so many rows and columns of a block take, as constants.
template <class Part>
inline void by_size(int64_t rows, int64_t cols, const Part& part) {
    constexpr std::integral_constant<int, 1> one{};
    constexpr std::integral_constant<int, 2> two{};
    if (rows > SIDE)
        cols > SIDE ? part(two, two) : part(two, one);
    else
        cols > SIDE ? part(one, two) : part(one, one);
}

template <int M, int N>
inline void store_sums(void* sums, int64_t stride) {
    float* to = static_cast<float*>(sums);  // or int32_t: four bytes as well
    _tile_stored(0, to, stride * 4);
    if (N > 1) _tile_stored(1, to + SIDE, stride * 4);
    if (M > 1) _tile_stored(2, to + SIDE * stride, stride * 4);
    if (M > 1 && N > 1) _tile_stored(3, to + SIDE * stride + SIDE, stride * 4);
}
