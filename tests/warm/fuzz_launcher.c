/* Hostile answers to the launcher's parser: `fuzz_launcher COUNT [SEED]`. Built with the sanitizers, which end the
 * process at the first fault; also a libFuzzer target where LIBFUZZER is defined.
 *
 * Inputs are well-formed conversations that were mutated (bits, bytes, numbers, lengths, cuts, repeats), because pure
 * noise never gets past the magic number. Each lies in memory of its own size, so that one byte too far is seen. */
#define NETLOOM_FUZZ
#include "../../warm/launcher.c"

static unsigned long frames, responses, refused;

/* Touches each byte that the parser handed out. */
static uint32_t read_all(struct slice slice)
{
    uint32_t sum = 0;

    for (size_t i = 0; i < slice.length; i++)
        sum += slice.data[i];
    return sum;
}

static void take_apart(const uint8_t *data, size_t size)
{
    volatile uint32_t sink = 0;
    struct frame frame = {0};
    struct response response;
    char version[16];
    struct bytes input = {.data = (uint8_t *)(uintptr_t)data, .size = size, .room = size};

    version_of(&input, version, sizeof version);
    if (strlen(version) == 0 || strspn(version, "0123456789.") != strlen(version))
        abort();
    for (int i = 0; i < 3; i++) { /* ACCEPTED, RESPONSE, and one too many */
        enum parsed parsed = frame_parse(data, size, &frame);
        if (parsed != PARSED_FRAME) {
            refused += parsed == PARSED_BAD;
            return;
        }
        frames++;
        if (frame.length > NETLOOM_FRAME_LIMIT || accepted_deadline_ms(&frame) < 0)
            abort();
        if (response_parse(&frame, &response)) {
            responses++;
            if (response.status > 255)
                abort();
            sink += read_all(response.out) + read_all(response.err);
        }
        data += NETLOOM_HEADER_SIZE + frame.length;
        size -= NETLOOM_HEADER_SIZE + frame.length;
    }
    (void)sink;
}

#ifdef LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    take_apart(data, size);
    return 0;
}
#else

static uint64_t state;

static uint32_t chance(uint32_t below)
{
    state ^= state << 13; /* xorshift64 */
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

static void frame_add(struct bytes *bytes, uint32_t kind, const struct bytes *body)
{
    uint8_t header[NETLOOM_HEADER_SIZE];

    header_write(header, kind, body->size);
    if (!bytes_add(bytes, header, sizeof header) || !bytes_add(bytes, body->data, body->size))
        abort();
}

/* What a worker might say. */
static void conversation(struct bytes *bytes, struct bytes *body)
{
    static const char text[] = "{\"cniVersion\": \"1.0.0\", \"code\": 11, \"msg\": \"x\"}";
    static const uint16_t tags[] = {NETLOOM_TAG_STDOUT, NETLOOM_TAG_STDERR, NETLOOM_TAG_STATUS, NETLOOM_TAG_DEADLINE,
                                    NETLOOM_TAG_REASON, 77};
    uint32_t number = chance(2) ? 0 : chance(UINT32_MAX);

    bytes->size = body->size = 0;
    if (!field_add(body, NETLOOM_TAG_DEADLINE, &number, 4))
        abort();
    frame_add(bytes, NETLOOM_KIND_ACCEPTED, body);
    body->size = 0;
    number = chance(300);
    if (!field_add(body, NETLOOM_TAG_STATUS, &number, 4))
        abort();
    for (uint32_t i = chance(5); i > 0; i--)
        if (!field_add(body, tags[chance(sizeof tags / sizeof *tags)], text, chance(sizeof text)))
            abort();
    frame_add(bytes, NETLOOM_KIND_RESPONSE, body);
}

static void mutate(struct bytes *bytes)
{
    static const uint32_t numbers[] = {0, 1, 7, 8, 15, 16, 255, 256, 65535, NETLOOM_FRAME_LIMIT, NETLOOM_FRAME_LIMIT + 1,
                                       INT32_MAX, UINT32_MAX - 7, UINT32_MAX};

    for (uint32_t i = chance(4); i > 0 && bytes->size > 4; i--) {
        uint32_t at = chance((uint32_t)bytes->size), number = numbers[chance(sizeof numbers / sizeof *numbers)];
        switch (chance(6)) {
        case 0:
            bytes->data[at] ^= (uint8_t)(1U << chance(8));
            break;
        case 1:
            bytes->data[at] = (uint8_t)chance(256);
            break;
        case 2:
            memcpy(bytes->data + (at & ~3U) % (bytes->size - 3), &number, 4);
            break;
        case 3:
            bytes->size = at;
            break;
        case 4: /* a piece of it once more at the end */
            if (!bytes_reserve(bytes, bytes->size))
                abort();
            memcpy(bytes->data + bytes->size, bytes->data + at, bytes->size - at);
            bytes->size += bytes->size - at;
            break;
        default:
            memmove(bytes->data + at, bytes->data + at + 1, bytes->size - at - 1);
            bytes->size--;
        }
    }
}

int main(int argc, char **argv)
{
    unsigned long count = argc > 1 ? strtoul(argv[1], NULL, 10) : 1000000;
    struct bytes bytes = {0}, body = {0};

    state = (argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)time(NULL) * 2654435761U) | 1;
    printf("seed %llu\n", (unsigned long long)state);
    (void)fflush(stdout);
    for (unsigned long i = 0; i < count; i++) {
        uint8_t *exact;
        conversation(&bytes, &body);
        mutate(&bytes);
        exact = malloc(bytes.size ? bytes.size : 1);
        if (!exact)
            abort();
        memcpy(exact, bytes.data, bytes.size);
        take_apart(exact, bytes.size);
        free(exact);
    }
    free(bytes.data);
    free(body.data);
    printf("%lu inputs, %lu frames, %lu responses, %lu refused\n", count, frames, responses, refused);
    return frames && responses && refused ? 0 : 1;
}
#endif
