/* Counts a tensor of activations in one pass over its memory.
 *
 * Floats are compared as integers: with the lower 31 bits of a negative number flipped, the order of the bit patterns is
 * the order of the numbers, -0 lies right below +0, and NaN lies beyond the infinities. So minima, maxima and counts are
 * integer reductions, which every compiler vectorises, and a value that is not finite shows in the extremes. A rectifier
 * counts those too, and its output can be written in the same pass; other kinds leave the call to counting.py. Sums run in
 * LANES lanes of float over at most BLOCK values and go on in double, in an order that no compiler may change: the same
 * numbers come out on every machine.
 *
 * counting.py counts the same integers with torch alone where this is not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define INFINITE 0x7f800000 /* key of +inf; that of -inf is -INFINITE - 1 */
#define BLOCK 4096
#define LANES 16
#define CHUNK 256
#define TILE 64
#define ROW 4096
#define WORTH_SHARING (1 << 16) /* values; fewer are counted before another thread has woken up */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

typedef Py_ssize_t Size;

/* torch's own pool of threads, as kernel.py finds it; a second pool would fight with it for the processors. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel parallel = NULL;

enum { RECTIFIER, INPUT, SQUASHED, OUTPUT };

/* What one call counts, an entry per unit. */
typedef struct {
    int32_t *low, *high;                  /* extremes, as keys */
    int64_t *positive;                    /* x > 0 */
    int64_t *zeros;                       /* x == 0 */
    int64_t *flat;                        /* x <= border_low or x >= border_high */
    int64_t *nonfinite, *nan;             /* of a RECTIFIER */
    double *sum, *abs_sum, *square_sum;   /* of x; of max(x, 0) for a RECTIFIER */
    double *plain_sum, *plain_square_sum; /* of x, for units that are silent */
    const uint8_t *silent;                /* units that have never fired; NULL to leave the plain sums out */
    uint8_t *on;                          /* (samples, units): set to 1 where any x is on; NULL to leave it out */
    int32_t *out; /* where a RECTIFIER writes its output, which may be its input; NULL to leave it out */
    int32_t border_low, border_high, border_on;
} Counts;

INLINE int32_t key_of(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

INLINE float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Bring LANES lanes down to one, halving them: an order that is the same everywhere. */
#define FOLD(lanes, op)                                                                                                \
    for (int half = LANES / 2; half > 0; half /= 2)                                                                    \
        for (int lane = 0; lane < half; lane++) (lanes)[lane] = op((lanes)[lane], (lanes)[lane + half]);
#define ADD(a, b) ((a) + (b))
#define LESSER(a, b) ((b) < (a) ? (b) : (a))
#define GREATER(a, b) ((b) > (a) ? (b) : (a))

/* Counts of LANES values side by side. */
typedef struct {
    int32_t low[LANES], high[LANES], positive[LANES], zeros[LANES], flat[LANES];
    float sum[LANES], abs_sum[LANES], square_sum[LANES];
} Lanes;

/* Count a value if `counts` is 1; if it is 0, the value is one that was counted before. */
INLINE void see(Lanes *lanes, int lane, int32_t bits, int counts, const Counts *c, int kind) {
    const int32_t key = key_of(bits);
    lanes->low[lane] = LESSER(lanes->low[lane], key);
    lanes->high[lane] = GREATER(lanes->high[lane], key);
    if (kind != OUTPUT) lanes->positive[lane] += counts & (key > 0);
    if (kind == OUTPUT) lanes->zeros[lane] += counts & ((bits & 0x7fffffff) == 0);
    if (kind == INPUT || kind == SQUASHED) lanes->flat[lane] += counts & ((key <= c->border_low) | (key >= c->border_high));
    if (kind == RECTIFIER || kind == OUTPUT) {
        const float value = float_of(bits & -(counts & (kind == OUTPUT || key > 0)));
        lanes->sum[lane] += value;
        lanes->square_sum[lane] += value * value;
    }
    if (kind == OUTPUT) lanes->abs_sum[lane] += float_of(bits & 0x7fffffff & -counts);
}

/* The sums of x and its square, over a row that is in the cache by now. */
INLINE void add_plain(const int32_t *x, Size n, double *sum, double *square_sum) {
    for (Size start = 0; start < n; start += BLOCK) {
        const Size stop = n - start < BLOCK ? n : start + BLOCK;
        float s[LANES] = {0}, q[LANES] = {0};
        Size i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                const float value = float_of(x[i + lane]);
                s[lane] += value;
                q[lane] += value * value;
            }
        for (int lane = 0; i < stop; i++, lane++) {
            s[lane] += float_of(x[i]);
            q[lane] += float_of(x[i]) * float_of(x[i]);
        }
        FOLD(s, ADD)
        FOLD(q, ADD)
        *sum += s[0];
        *square_sum += q[0];
    }
}

static int is_finite(double value) { return value - value == 0; }

/* Count `n` inputs of a RECTIFIER one by one, as some are not finite or have squares beyond a float. The first of them
 * stands in row `row` of all, and they are `step` values apart. */
static void count_carefully(const int32_t *x, Size n, Size step, Size row, Size positions, Size unit, Size units,
                            const Counts *c) {
    for (Size i = 0; i < n; i++) {
        const int32_t bits = x[i * step], key = key_of(bits), magnitude = bits & 0x7fffffff;
        const double value = float_of(bits);
        c->nonfinite[unit] += magnitude >= INFINITE;
        if (c->silent && c->silent[unit]) {
            c->plain_sum[unit] += value;
            c->plain_square_sum[unit] += value * value;
        }
        if (magnitude > INFINITE) {
            c->nan[unit]++;
            continue;
        }
        c->low[unit] = LESSER(c->low[unit], key);
        c->high[unit] = GREATER(c->high[unit], key);
        c->positive[unit] += key > 0;
        if (c->on) c->on[(row + i) / positions * units + unit] |= key > c->border_on;
        if (magnitude < INFINITE && key > 0) {
            c->sum[unit] += value;
            c->square_sum[unit] += value * value;
        }
    }
}

/* Write max(x, 0) as torch does: -0 and NaN stay as they are. */
INLINE void rectify(const int32_t *x, int32_t *out, Size n) {
    for (Size i = 0; i < n; i++) {
        const int32_t bits = x[i];
        out[i] = (key_of(bits) >= -1) | ((bits & 0x7fffffff) > INFINITE) ? bits : 0;
    }
}

/* One row of `n` values of a single unit. */
INLINE void count_row(const int32_t *x, Size n, Size unit, Size at, Size units, const Counts *c, int kind) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    int64_t positive = 0, zeros = 0, flat = 0;
    double sum = 0, abs_sum = 0, square_sum = 0, plain_sum = 0, plain_square_sum = 0;
    for (Size start = 0; start < n; start += BLOCK) {
        const Size stop = n - start < BLOCK ? n : start + BLOCK;
        Lanes lanes = {{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}};
        for (int lane = 0; lane < LANES; lane++) {
            lanes.low[lane] = INT32_MAX;
            lanes.high[lane] = INT32_MIN;
        }
        Size i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) see(&lanes, lane, x[i + lane], 1, c, kind);
        if (i < stop) {
            int32_t tail[LANES];
            for (int lane = 0; lane < LANES; lane++) tail[lane] = x[start];
            memcpy(tail, x + i, (size_t)(stop - i) * sizeof *x);
            for (int lane = 0; lane < LANES; lane++) see(&lanes, lane, tail[lane], lane < stop - i, c, kind);
        }
        FOLD(lanes.low, LESSER)
        FOLD(lanes.high, GREATER)
        low = LESSER(low, lanes.low[0]);
        high = GREATER(high, lanes.high[0]);
        if (kind != OUTPUT) {
            FOLD(lanes.positive, ADD)
            positive += lanes.positive[0];
        } else {
            FOLD(lanes.zeros, ADD)
            FOLD(lanes.abs_sum, ADD)
            zeros += lanes.zeros[0];
            abs_sum += lanes.abs_sum[0];
        }
        if (kind == INPUT || kind == SQUASHED) {
            FOLD(lanes.flat, ADD)
            flat += lanes.flat[0];
        } else {
            FOLD(lanes.sum, ADD)
            FOLD(lanes.square_sum, ADD)
            sum += lanes.sum[0];
            square_sum += lanes.square_sum[0];
        }
    }
    if (c->silent && c->silent[unit]) add_plain(x, n, &plain_sum, &plain_square_sum);
    if (kind == RECTIFIER && !(low > -INFINITE - 1 && high < INFINITE && is_finite(square_sum + plain_square_sum))) {
        count_carefully(x, n, 1, at / units * n, n, unit, units, c);
    } else {
        c->low[unit] = LESSER(c->low[unit], low);
        c->high[unit] = GREATER(c->high[unit], high);
        c->positive[unit] += positive;
        c->zeros[unit] += zeros;
        c->flat[unit] += flat;
        c->sum[unit] += sum;
        c->abs_sum[unit] += abs_sum;
        c->square_sum[unit] += square_sum;
        c->plain_sum[unit] += plain_sum;
        c->plain_square_sum[unit] += plain_square_sum;
        if (c->on) c->on[at] |= kind == SQUASHED ? flat < n : high > c->border_on;
    }
    if (kind == RECTIFIER && c->out) rectify(x, c->out + at * n, n);
}

/* Values ordered (samples, units, positions); units from `first` to before `end`. */
INLINE void count_rows(const int32_t *x, Size samples, Size units, Size positions, Size first, Size end, const Counts *c,
                       int kind) {
    for (Size sample = 0; sample < samples; sample++)
        for (Size unit = first; unit < end; unit++) {
            const Size at = sample * units + unit;
            count_row(x + at * positions, positions, unit, at, units, c, kind);
        }
}

/* `height` rows from row `top` on, of `width` units from unit `first` on. */
INLINE void count_tile(const int32_t *x, Size top, Size height, Size first, Size width, Size units, Size positions,
                       const Counts *c, int kind) {
    int32_t low[CHUNK], high[CHUNK], peak[CHUNK], positive[CHUNK], zeros[CHUNK], flat[CHUNK], inside[CHUNK];
    float s[CHUNK], a[CHUNK], q[CHUNK];
    for (Size i = 0; i < width; i++) {
        low[i] = INT32_MAX;
        high[i] = peak[i] = INT32_MIN;
        positive[i] = zeros[i] = flat[i] = inside[i] = 0;
        s[i] = a[i] = q[i] = 0;
    }
    const int32_t *row = x;
    for (Size r = 0; r < height; r++, row += units) {
        for (Size i = 0; i < width; i++) {
            const int32_t bits = row[i];
            const int32_t key = key_of(bits);
            low[i] = LESSER(low[i], key);
            peak[i] = GREATER(peak[i], key);
            if (kind != OUTPUT) positive[i] += key > 0;
            if (kind == OUTPUT) zeros[i] += (bits & 0x7fffffff) == 0;
            if (kind == INPUT || kind == SQUASHED) {
                const int32_t is_flat = (key <= c->border_low) | (key >= c->border_high);
                flat[i] += is_flat;
                if (kind == SQUASHED) inside[i] |= !is_flat;
            }
            if (kind == RECTIFIER || kind == OUTPUT) {
                const float value = float_of(kind == RECTIFIER ? (key > 0 ? bits : 0) : bits);
                s[i] += value;
                q[i] += value * value;
            }
            if (kind == OUTPUT) a[i] += float_of(bits & 0x7fffffff);
        }
        if (c->on && positions == 1) {
            uint8_t *on = c->on + (top + r) * units + first;
            for (Size i = 0; i < width; i++) {
                const int32_t key = key_of(row[i]);
                on[i] |= kind == SQUASHED ? (key > c->border_low) & (key < c->border_high)
                                          : (key > c->border_on) & (key <= INFINITE);
            }
        } else if (c->on && (r == height - 1 || (top + r + 1) % positions == 0)) { /* the last row of a sample here */
            uint8_t *on = c->on + (top + r) / positions * units + first;
            for (Size i = 0; i < width; i++)
                on[i] |= kind == SQUASHED ? inside[i] : (peak[i] > c->border_on) & (peak[i] <= INFINITE);
            for (Size i = 0; i < width; i++) {
                high[i] = GREATER(high[i], peak[i]);
                peak[i] = INT32_MIN;
                inside[i] = 0;
            }
        }
    }
    float plain[CHUNK], plain_squares[CHUNK];
    int any_silent = 0;
    for (Size i = 0; i < width; i++) {
        plain[i] = plain_squares[i] = 0;
        any_silent |= c->silent && c->silent[first + i];
    }
    row = x;
    for (Size r = 0; any_silent && r < height; r++, row += units) /* the tile is in the cache by now */
        for (Size i = 0; i < width; i++) {
            plain[i] += float_of(row[i]);
            plain_squares[i] += float_of(row[i]) * float_of(row[i]);
        }
    for (Size i = 0; i < width; i++) {
        const Size unit = first + i;
        const int32_t top_key = GREATER(high[i], peak[i]);
        const int is_silent = any_silent && c->silent[unit];
        if (kind == RECTIFIER && !(low[i] > -INFINITE - 1 && top_key < INFINITE && is_finite(q[i]) &&
                                   (!is_silent || is_finite(plain_squares[i])))) {
            count_carefully(x + i, height, units, top, positions, unit, units, c);
            continue;
        }
        c->low[unit] = LESSER(c->low[unit], low[i]);
        c->high[unit] = GREATER(c->high[unit], top_key);
        c->positive[unit] += positive[i];
        c->zeros[unit] += zeros[i];
        c->flat[unit] += flat[i];
        c->sum[unit] += s[i];
        c->abs_sum[unit] += a[i];
        c->square_sum[unit] += q[i];
        if (is_silent) {
            c->plain_sum[unit] += plain[i];
            c->plain_square_sum[unit] += plain_squares[i];
        }
    }
    if (kind == RECTIFIER && c->out)
        for (Size r = 0; r < height; r++) rectify(x + r * units, c->out + (top + r) * units + first, width);
}

/* Values ordered (samples, positions, units): TILE rows of CHUNK units at a time. The counts of a chunk stay in the
 * first-level cache, and the rows of a tile on few enough pages for the processor to remember where they are. */
INLINE void count_columns(const int32_t *x, Size samples, Size units, Size positions, Size first, Size end,
                          const Counts *c, int kind) {
    const Size rows = samples * positions;
    for (Size top = 0; top < rows; top += TILE)
        for (Size left = first; left < end; left += CHUNK)
            count_tile(x + top * units + left, top, rows - top < TILE ? rows - top : TILE, left,
                       end - left < CHUNK ? end - left : CHUNK, units, positions, c, kind);
}

/* One function per kind and order, and per set of vector instructions. */
#define DEFINE(kind, name)                                                                                             \
    CLONES static void name##_rows(const int32_t *x, Size s, Size u, Size p, Size from, Size to, const Counts *c) {    \
        count_rows(x, s, u, p, from, to, c, kind);                                                                     \
    }                                                                                                                  \
    CLONES static void name##_columns(const int32_t *x, Size s, Size u, Size p, Size from, Size to, const Counts *c) { \
        count_columns(x, s, u, p, from, to, c, kind);                                                                  \
    }
DEFINE(RECTIFIER, rectifier)
DEFINE(INPUT, input)
DEFINE(SQUASHED, squashed)
DEFINE(OUTPUT, output)

typedef void (*Kernel)(const int32_t *, Size, Size, Size, Size, Size, const Counts *);
static const Kernel KERNELS[4][2] = {{rectifier_rows, rectifier_columns},
                                     {input_rows, input_columns},
                                     {squashed_rows, squashed_columns},
                                     {output_rows, output_columns}};

/* What the threads of one call share. Each counts units of its own, so that no sum depends on their number. */
typedef struct {
    Kernel kernel;
    const int32_t *x;
    Size samples, units, positions, share, next;
    const Counts *c;
} Work;

/* Take shares until none is left: there may be fewer threads than were asked for. */
static void count_shares(void *shared) {
    Work *w = shared;
#if defined(__GNUC__)
    for (Size first; (first = __atomic_fetch_add(&w->next, w->share, __ATOMIC_RELAXED)) < w->units;) {
        const Size end = w->units - first < w->share ? w->units : first + w->share;
        w->kernel(w->x, w->samples, w->units, w->positions, first, end, w->c);
    }
#else
    w->kernel(w->x, w->samples, w->units, w->positions, 0, w->units, w->c); /* never shared: no GOMP_parallel */
#endif
}

/* Share out the units to as many threads, in steps of a cache line of floats. */
static void count_all(Kernel kernel, const int32_t *x, Size samples, Size units, Size positions, const Counts *c,
                      int threads) {
    const Size even = (units + threads - 1) / threads, share = (even + LANES - 1) / LANES * LANES;
    Work work = {kernel, x, samples, units, positions, share, 0, c};
    if (parallel == NULL || threads < 2 || share >= units || samples * units * positions < WORTH_SHARING)
        kernel(x, samples, units, positions, 0, units, c);
    else
        parallel(count_shares, &work, (unsigned)threads, 0);
}

/* Totals of a site, in the order in which kernel.py gives their addresses. */
typedef struct {
    double *input_low, *input_high, *output_low, *output_high;
    int64_t *positive, *zeros, *flat, *nonfinite;
    double *sum, *abs_sum, *square_sum, *plain_sum, *plain_square_sum; /* of the running batch */
} Totals;
#define N_TOTALS 13

INLINE void extend(double *low, double *high, double from, double to) {
    if (from < *low) *low = from;
    if (to > *high) *high = to;
}

/* Add what a call counted to the totals, `n` values a unit. */
static void add(const Counts *c, const Totals *t, Size units, int64_t n, int kind) {
    for (Size u = 0; u < units; u++) {
        const int is_seen = c->low[u] <= c->high[u]; /* or every value was NaN */
        const double low = float_of(key_of(c->low[u])), high = float_of(key_of(c->high[u]));
        if (kind == OUTPUT) {
            if (is_seen) extend(&t->output_low[u], &t->output_high[u], low, high);
            t->zeros[u] += c->zeros[u];
        } else {
            if (is_seen) extend(&t->input_low[u], &t->input_high[u], low, high);
            t->positive[u] += c->positive[u];
            t->flat[u] += kind == RECTIFIER ? n - c->positive[u] - c->nan[u] : c->flat[u];
        }
        if (kind == RECTIFIER) { /* the output is 0 exactly where the input is not above 0 */
            if (is_seen) extend(&t->output_low[u], &t->output_high[u], low > 0 ? low : 0, high > 0 ? high : 0);
            t->zeros[u] += n - c->positive[u] - c->nan[u];
            t->nonfinite[u] += c->nonfinite[u];
            t->abs_sum[u] += c->sum[u];
        }
        if (kind == OUTPUT) t->abs_sum[u] += c->abs_sum[u];
        t->sum[u] += c->sum[u];
        t->square_sum[u] += c->square_sum[u];
        t->plain_sum[u] += c->plain_sum[u];
        t->plain_square_sum[u] += c->plain_square_sum[u];
    }
}

static int32_t key_of_float(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return key_of(bits);
}

static const char COUNT_DOC[] =
    "count(kind, units_last, data, samples, units, positions, totals, silent, on, border_low, border_high, border_on,\n"
    "      threads, out)\n"
    "--\n\n"
    "Count float32 values at the address `data` and add to `totals`, a tuple of addresses; 0 leaves `silent`, `on`\n"
    "or `out` out. A rectifier also writes max(x, 0) to the address `out`, which may be `data`. Return False, with\n"
    "nothing added, where a value or its square is not finite and the kind is no rectifier.";

static PyObject *count(PyObject *self, PyObject *args) {
    int kind, units_last, threads;
    unsigned long long data, silent, on, out, t[N_TOTALS];
    Size samples, units, positions;
    float border_low, border_high, border_on;
    if (!PyArg_ParseTuple(args, "ipKnnn(KKKKKKKKKKKKK)KKfffiK", &kind, &units_last, &data, &samples, &units, &positions,
                          &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7], &t[8], &t[9], &t[10], &t[11],
                          &t[12], &silent, &on, &border_low, &border_high, &border_on, &threads, &out))
        return NULL;
    if (kind < RECTIFIER || kind > OUTPUT || threads < 1 || samples < 0 || units < 0 || positions < 0) {
        PyErr_SetString(PyExc_ValueError, "no such kind of count, a negative size, or no thread");
        return NULL;
    }
    const size_t n = (size_t)units;
    int64_t *ints = calloc(n + 1, 5 * sizeof(int64_t) + 5 * sizeof(double) + 2 * sizeof(int32_t));
    if (ints == NULL) return PyErr_NoMemory();
    double *reals = (double *)(ints + 5 * n);
    int32_t *keys = (int32_t *)(reals + 5 * n);
    const Counts c = {.low = keys, .high = keys + n,
                      .positive = ints, .zeros = ints + n, .flat = ints + 2 * n, .nonfinite = ints + 3 * n, .nan = ints + 4 * n,
                      .sum = reals, .abs_sum = reals + n, .square_sum = reals + 2 * n,
                      .plain_sum = reals + 3 * n, .plain_square_sum = reals + 4 * n,
                      .silent = (const uint8_t *)(uintptr_t)silent, .on = (uint8_t *)(uintptr_t)on,
                      .out = (int32_t *)(uintptr_t)out,
                      .border_low = key_of_float(border_low), .border_high = key_of_float(border_high),
                      .border_on = key_of_float(border_on)};
    Totals totals;
    void **address = (void **)&totals;
    for (int i = 0; i < N_TOTALS; i++) address[i] = (void *)(uintptr_t)t[i];
    int finite = 1;
    Py_BEGIN_ALLOW_THREADS
    for (size_t u = 0; u < n; u++) {
        c.low[u] = INT32_MAX;
        c.high[u] = INT32_MIN;
    }
    count_all(KERNELS[kind][units_last != 0], (const int32_t *)(uintptr_t)data, samples, units, positions, &c, threads);
    for (size_t u = 0; u < n && kind != RECTIFIER; u++)
        finite &= c.low[u] > -INFINITE - 1 && c.high[u] < INFINITE && is_finite(c.square_sum[u]) &&
                  is_finite(c.plain_square_sum[u]);
    if (finite) add(&c, &totals, units, (int64_t)samples * positions, kind);
    Py_END_ALLOW_THREADS
    free(ints);
    return PyBool_FromLong(finite);
}

/* Add a batch to the samples fired, in units of one byte, and find the first sample in which each unit fired. */
CLONES static int fire_units(const uint8_t *on, Size samples, Size units, int64_t first_sample, int64_t *fired,
                             int64_t *first, uint8_t *unfired) {
    int left = 0;
    for (Size start = 0; start < units; start += ROW) {
        const Size width = units - start < ROW ? units - start : ROW;
        uint8_t *waiting = unfired + start;
        uint16_t times[ROW] = {0};
        int any = 0;
        for (Size u = 0; u < width; u++) any |= waiting[u];
        for (Size sample = 0; sample < samples; sample++) {
            const uint8_t *row = on + sample * units + start;
            for (Size u = 0; u < width; u++) times[u] += row[u];
            if (sample % 0xffff == 0xfffe || sample == samples - 1)
                for (Size u = 0; u < width; u++) {
                    fired[start + u] += times[u];
                    times[u] = 0;
                }
            if (!any) continue;
            uint8_t hit = 0;
            any = 0;
            for (Size u = 0; u < width; u++) hit |= waiting[u] & row[u];
            if (hit)
                for (Size u = 0; u < width; u++)
                    if (waiting[u] & row[u]) {
                        waiting[u] = 0;
                        first[start + u] = first_sample + sample;
                    }
            for (Size u = 0; u < width; u++) any |= waiting[u];
        }
        left |= any;
    }
    return left;
}

/* Add the sums of a batch to the totals, what rounding drops to the rest (Knuth's two-sum), and clear them. */
static void settle(double *batch, double *sums, double *rest, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const double total = sums[i] + batch[i], back = total - sums[i];
        const double dropped = (sums[i] - (total - back)) + (batch[i] - back);
        if (is_finite(dropped)) rest[i] += dropped;
        sums[i] = total;
        batch[i] = 0;
    }
}

static const char SETTLE_DOC[] =
    "settle(batch, sums, rest, n)\n"
    "--\n\n"
    "Add `n` sums of a batch to the totals and what rounding drops to the rest, all at addresses; clear the batch.";

static PyObject *settle_sums(PyObject *self, PyObject *args) {
    unsigned long long batch, sums, rest;
    Size n;
    if (!PyArg_ParseTuple(args, "KKKn", &batch, &sums, &rest, &n)) return NULL;
    settle((double *)(uintptr_t)batch, (double *)(uintptr_t)sums, (double *)(uintptr_t)rest, (size_t)n);
    Py_RETURN_NONE;
}

static const char FIRE_DOC[] =
    "fire(on, samples, units, first_sample, fired, first_fired, unfired)\n"
    "--\n\n"
    "Add a batch, (samples, units) of 0 and 1 at the address `on`, to the samples fired and the first of them.\n"
    "Return whether there is a unit that has not fired yet.";

static PyObject *fire(PyObject *self, PyObject *args) {
    unsigned long long on_at, fired_at, first_at, unfired_at;
    Size samples, units;
    long long first_sample;
    if (!PyArg_ParseTuple(args, "KnnLKKK", &on_at, &samples, &units, &first_sample, &fired_at, &first_at, &unfired_at))
        return NULL;
    int left;
    Py_BEGIN_ALLOW_THREADS
    left = fire_units((const uint8_t *)(uintptr_t)on_at, samples, units, first_sample, (int64_t *)(uintptr_t)fired_at,
                      (int64_t *)(uintptr_t)first_at, (uint8_t *)(uintptr_t)unfired_at);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(left);
}

static const char USE_DOC[] =
    "use_threads(parallel)\n"
    "--\n\n"
    "Share large counts out to the threads of GOMP_parallel, which stands at this address.";

static PyObject *use_threads(PyObject *self, PyObject *args) {
    unsigned long long parallel_at;
    if (!PyArg_ParseTuple(args, "K", &parallel_at)) return NULL;
    parallel = (Parallel)(uintptr_t)parallel_at;
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {{"count", count, METH_VARARGS, COUNT_DOC},
                                {"fire", fire, METH_VARARGS, FIRE_DOC},
                                {"settle", settle_sums, METH_VARARGS, SETTLE_DOC},
                                {"use_threads", use_threads, METH_VARARGS, USE_DOC},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_counting", "One pass over a tensor of activations.", 0,
                                    METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__counting(void) { return PyModule_Create(&MODULE); }
