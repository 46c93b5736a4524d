/* The executable of every CNI plugin: hands the request to a warm worker and prints what comes back.
 *
 * Rules of this file (docs/warm-protocol.md has them in full)
 * - Until a worker says ACCEPTED, whatever goes wrong leads to the cold way: the bundle is executed with the same
 *   environment and standard input. After ACCEPTED it never does: a worker that is lost then is CNI error 11.
 * - Giving up on a worker is shutdown(SHUT_RD) and one more look: from then on the worker's ACCEPTED fails, so that it
 *   does not start, and one that was sent before is found.
 * - DONE goes out after standard output was written. Where either fails, an ADD exits with 1: the worker undoes it.
 * - No allocation but for buffers, no dependency but libc, or not even that (bare.h); every wait is bounded.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"
#ifdef NETLOOM_BARE
#include "bare.h"
#endif

#ifndef NETLOOM_COLD
#define NETLOOM_COLD "/usr/lib/netloom/netloom-cni"
#endif
#define RUN_DIR "/run/netloom"
#define SOCKET_NAME "cni.sock"

/* How long a worker may take to accept. A busy machine serves its queue in tens of milliseconds, and the master adds a
 * worker when all are busy for 20; a cold process costs 200 ms of processor time, so going cold early under load makes
 * the load worse. A second is what an ADD can lose to a worker that hangs before it accepts. */
#define ACCEPT_WAIT_MS 1000
/* After the deadline that a worker names in ACCEPTED: what it may take to undo and to answer. */
#define ANSWER_GRACE_MS 15000
#define ANSWER_WAIT_MS 60000 /* where it names none */

enum { CNI_IO_FAILURE = 5, CNI_DECODING_FAILURE = 6, CNI_TRY_AGAIN_LATER = 11 };

struct bytes {
    uint8_t *data;
    size_t size;
    size_t room;
};

struct frame {
    uint16_t version;
    uint16_t oldest;
    uint32_t kind;
    const uint8_t *body;
    size_t length;
};

struct slice {
    const uint8_t *data;
    size_t length;
};

struct response {
    struct slice out;
    struct slice err;
    uint32_t status;
};

/* Pure: what the bytes mean. */

enum parsed { PARSED_MORE, PARSED_FRAME, PARSED_BAD };

/* The first frame of what was received. */
static enum parsed frame_parse(const uint8_t *data, size_t size, struct frame *frame)
{
    uint32_t magic, length;

    if (size < NETLOOM_HEADER_SIZE)
        return PARSED_MORE;
    memcpy(&magic, data, 4);
    memcpy(&frame->version, data + 4, 2);
    memcpy(&frame->oldest, data + 6, 2);
    memcpy(&frame->kind, data + 8, 4);
    memcpy(&length, data + 12, 4);
    if (magic != NETLOOM_MAGIC || length > NETLOOM_FRAME_LIMIT)
        return PARSED_BAD;
    if (frame->oldest > NETLOOM_VERSION || frame->version < NETLOOM_OLDEST)
        return PARSED_BAD;
    frame->body = data + NETLOOM_HEADER_SIZE;
    frame->length = length;
    return size - NETLOOM_HEADER_SIZE < length ? PARSED_MORE : PARSED_FRAME;
}

/* The next field of a frame's body. False at its end; *broken is set where the body does not end with a field. */
static bool field_next(struct slice *rest, uint16_t *tag, uint16_t *flags, struct slice *value, bool *broken)
{
    uint32_t length;

    if (rest->length == 0)
        return false;
    if (rest->length < NETLOOM_FIELD_SIZE) {
        *broken = true;
        return false;
    }
    memcpy(tag, rest->data, 2);
    memcpy(flags, rest->data + 2, 2);
    memcpy(&length, rest->data + 4, 4);
    if (length > rest->length - NETLOOM_FIELD_SIZE) {
        *broken = true;
        return false;
    }
    value->data = rest->data + NETLOOM_FIELD_SIZE;
    value->length = length;
    rest->data += NETLOOM_FIELD_SIZE + length;
    rest->length -= NETLOOM_FIELD_SIZE + length;
    return true;
}

static bool number_parse(struct slice value, uint32_t *number)
{
    if (value.length != 4)
        return false;
    memcpy(number, value.data, 4);
    return true;
}

/* False for a frame that is no RESPONSE as we know them. */
static bool response_parse(const struct frame *frame, struct response *response)
{
    struct slice rest = {frame->body, frame->length}, value;
    uint16_t tag, flags;
    bool broken = false, has_status = false;

    if (frame->kind != NETLOOM_KIND_RESPONSE)
        return false;
    memset(response, 0, sizeof *response);
    while (field_next(&rest, &tag, &flags, &value, &broken)) {
        if (tag == NETLOOM_TAG_STDOUT)
            response->out = value;
        else if (tag == NETLOOM_TAG_STDERR)
            response->err = value;
        else if (tag == NETLOOM_TAG_STATUS)
            has_status = number_parse(value, &response->status);
        else if (flags & NETLOOM_FIELD_REQUIRED)
            return false;
    }
    return !broken && has_status && response->status <= 255;
}

/* How many milliseconds the worker allows itself. */
static int accepted_deadline_ms(const struct frame *frame)
{
    struct slice rest = {frame->body, frame->length}, value;
    uint16_t tag, flags;
    uint32_t deadline_ms = ANSWER_WAIT_MS;
    bool broken = false;

    while (field_next(&rest, &tag, &flags, &value, &broken))
        if (tag == NETLOOM_TAG_DEADLINE)
            (void)number_parse(value, &deadline_ms);
    /* An hour is more than any runtime waits, and keeps the sum within an int. */
    return (int)(deadline_ms < 3600000 ? deadline_ms : 3600000) + ANSWER_GRACE_MS;
}

/* The text of "cniVersion" in a configuration that nobody parsed: digits and dots, or the newest version. */
static void version_of(const struct bytes *input, char *version, size_t room)
{
    static const char key[] = "\"cniVersion\"";
    const uint8_t *end = input->data + input->size, *at;
    size_t length = 0;

    (void)snprintf(version, room, "1.1.0");
    at = input->size ? memmem(input->data, input->size, key, sizeof key - 1) : NULL;
    if (!at)
        return;
    for (at += sizeof key - 1; at < end && (*at == ' ' || *at == ':' || *at == '\t' || *at == '\n'); at++)
        ;
    if (at >= end || *at != '"')
        return;
    at++;
    while (at + length < end && (at[length] == '.' || (at[length] >= '0' && at[length] <= '9')))
        length++;
    if (length == 0 || length >= room || at + length >= end || at[length] != '"')
        return;
    memcpy(version, at, length);
    version[length] = 0;
}

/* Buffers. */

static bool bytes_reserve(struct bytes *bytes, size_t more)
{
    size_t room = bytes->room ? bytes->room : 16384;
    uint8_t *data;

    while (room - bytes->size < more)
        room *= 2;
    if (room == bytes->room)
        return true;
    data = realloc(bytes->data, room);
    if (!data)
        return false;
    bytes->data = data;
    bytes->room = room;
    return true;
}

static bool bytes_add(struct bytes *bytes, const void *data, size_t size)
{
    if (!bytes_reserve(bytes, size))
        return false;
    if (size)
        memcpy(bytes->data + bytes->size, data, size);
    bytes->size += size;
    return true;
}

static bool field_add(struct bytes *bytes, uint16_t tag, const void *data, size_t size)
{
    uint16_t flags = 0;
    uint32_t length = (uint32_t)size;

    return size <= NETLOOM_FRAME_LIMIT && bytes_add(bytes, &tag, 2) && bytes_add(bytes, &flags, 2) &&
           bytes_add(bytes, &length, 4) && bytes_add(bytes, data, size);
}

static void header_write(uint8_t *to, uint32_t kind, size_t length)
{
    const uint32_t magic = NETLOOM_MAGIC, size = (uint32_t)length;
    const uint16_t version = NETLOOM_VERSION, oldest = NETLOOM_OLDEST;

    memcpy(to, &magic, 4);
    memcpy(to + 4, &version, 2);
    memcpy(to + 6, &oldest, 2);
    memcpy(to + 8, &kind, 4);
    memcpy(to + 12, &size, 4);
}

#ifndef NETLOOM_FUZZ

static const char *program;

static bool write_all(int fd, const void *data, size_t size)
{
    const uint8_t *at = data;

    while (size) {
        ssize_t written = write(fd, at, size);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0 && errno == EAGAIN) { /* a runtime's pipe may be non-blocking */
            struct pollfd ready = {.fd = fd, .events = POLLOUT};
            (void)poll(&ready, 1, -1);
            continue;
        }
        if (written < 0)
            return false;
        at += written;
        size -= (size_t)written;
    }
    return true;
}

/* Prints a CNI error and returns the exit status. The texts hold nothing that JSON would have to escape. */
static int fail(const struct bytes *input, int code, const char *message, const char *details)
{
    char version[16], text[1024];
    int size;

    version_of(input, version, sizeof version);
    size = snprintf(text, sizeof text, "{\n    \"cniVersion\": \"%s\",\n    \"code\": %d,\n    \"msg\": \"%s\"%s%s%s\n}",
                    version, code, message, *details ? ",\n    \"details\": \"" : "", details, *details ? "\"" : "");
    (void)write_all(1, text, (size_t)size);
    return 1;
}

static int64_t now_ms(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits for an event on the descriptor until the moment; false when it passed. */
static bool wait_for(int fd, short events, int64_t until_ms)
{
    struct pollfd one = {.fd = fd, .events = events};

    for (;;) {
        int64_t left = until_ms - now_ms();
        int found = poll(&one, 1, left > 0 ? (int)left : 0);
        if (found > 0)
            return true;
        if (found == 0 && left <= 0)
            return false;
        if (found < 0 && errno != EINTR)
            return false;
    }
}

/* Standard input. */

/* Only these verbs have one; the others must not wait for a terminal or an open pipe. */
static bool reads_stdin(void)
{
    static const char *const verbs[] = {"ADD", "DEL", "CHECK", "GC", "STATUS"};
    const char *verb = getenv("CNI_COMMAND");

    for (size_t i = 0; verb && i < sizeof verbs / sizeof *verbs; i++)
        if (strcmp(verb, verbs[i]) == 0)
            return true;
    return false;
}

/* All of it, or one byte more than the limit. 0, or an error number. */
static int read_stdin(struct bytes *input)
{
    while (input->size <= NETLOOM_STDIN_LIMIT) {
        size_t want = NETLOOM_STDIN_LIMIT + 1 - input->size;
        ssize_t got;

        if (want > 65536)
            want = 65536;
        if (!bytes_reserve(input, want))
            return ENOMEM;
        got = read(0, input->data + input->size, want);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN) {
            struct pollfd ready = {.fd = 0, .events = POLLIN};
            (void)poll(&ready, 1, -1);
            continue;
        }
        if (got < 0)
            return errno;
        if (got == 0)
            return 0;
        input->size += (size_t)got;
    }
    return 0;
}

/* The cold way. */

static int cold(char **argv, char **environment, const struct bytes *input, bool has_input)
{
    const char *path = getenv("NETLOOM_CNI_COLD");
    char joined[4096], details[512];

    if (!path || !*path)
        path = NETLOOM_COLD;
    if (path[strlen(path) - 1] == '/') { /* a directory with one executable for each plugin */
        if ((size_t)snprintf(joined, sizeof joined, "%s%s", path, program) >= sizeof joined)
            return fail(input, CNI_IO_FAILURE, "NETLOOM_CNI_COLD is too long", "");
        path = joined;
    }
    if (has_input) {
        int fd = memfd_create("stdin", MFD_CLOEXEC);
        if (fd < 0 || !write_all(fd, input->data, input->size) || lseek(fd, 0, SEEK_SET) != 0 || dup2(fd, 0) != 0) {
            (void)snprintf(details, sizeof details, "%s", strerror(errno));
            return fail(input, CNI_IO_FAILURE, "cannot keep standard input for a cold start", details);
        }
    }
    (void)signal(SIGPIPE, SIG_DFL);
    (void)execve(path, argv, environment);
    (void)snprintf(details, sizeof details, "%s; install the Netloom package again, or start netloom-cni.service",
                   strerror(errno));
    return fail(input, CNI_IO_FAILURE, "no warm worker took the request, and the program for a cold start cannot be run",
                details);
}

/* The request. */

static bool add_environment(struct bytes *bytes, char **environment)
{
    size_t at = bytes->size, size;
    uint32_t length;

    if (!field_add(bytes, NETLOOM_TAG_ENVIRONMENT, NULL, 0))
        return false;
    for (char **one = environment; *one; one++)
        if (bytes->size > NETLOOM_FRAME_LIMIT || !bytes_add(bytes, *one, strlen(*one) + 1))
            return false;
    size = bytes->size - at - NETLOOM_FIELD_SIZE;
    length = (uint32_t)size;
    memcpy(bytes->data + at + 4, &length, 4);
    return true;
}

/* Where this process is: a worker that is elsewhere cannot stand in for it. */
static bool add_places(struct bytes *bytes)
{
    static const char *const paths[] = {"/proc/self/ns/net", "/proc/self/ns/mnt", "/proc/self/ns/user", "/"};
    uint64_t places[2 * sizeof paths / sizeof *paths];

    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        struct stat status;
        if (stat(paths[i], &status) != 0)
            return false;
        places[2 * i] = status.st_dev;
        places[2 * i + 1] = status.st_ino;
    }
    return field_add(bytes, NETLOOM_TAG_PLACES, places, sizeof places);
}

/* The frame and its descriptors, of which *count are returned. False where it cannot be made. */
static bool request_make(struct bytes *bytes, char **environment, const struct bytes *input, bool has_input,
                         int descriptors[2], size_t *count)
{
    const char *netns = getenv("CNI_NETNS");
    uint8_t header[NETLOOM_HEADER_SIZE] = {0};
    uint32_t which = NETLOOM_DESCRIPTOR_CWD, mask;
    mode_t before = umask(0);

    (void)umask(before);
    mask = (uint32_t)before;
    *count = 0;
    descriptors[*count] = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (descriptors[(*count)++] < 0)
        return false;
    if (netns && *netns) {
        /* O_NONBLOCK: a FIFO under that name must not hang us. */
        int fd = open(netns, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (fd >= 0) {
            descriptors[(*count)++] = fd;
            which |= NETLOOM_DESCRIPTOR_NETNS;
        }
    }
    if (!bytes_add(bytes, header, sizeof header) ||
        !field_add(bytes, NETLOOM_TAG_PROGRAM, program, strlen(program)) || !add_places(bytes) ||
        !field_add(bytes, NETLOOM_TAG_UMASK, &mask, 4) || !field_add(bytes, NETLOOM_TAG_DESCRIPTORS, &which, 4) ||
        !add_environment(bytes, environment))
        return false;
    if (has_input && !field_add(bytes, NETLOOM_TAG_STDIN, input->data, input->size))
        return false;
    if (bytes->size - NETLOOM_HEADER_SIZE > NETLOOM_FRAME_LIMIT)
        return false;
    header_write(bytes->data, NETLOOM_KIND_REQUEST, bytes->size - NETLOOM_HEADER_SIZE);
    return true;
}

/* The hand-off. */

/* Where the workers listen. False where the path is too long for anybody. */
static bool socket_path(char *path, size_t room)
{
    const char *given = getenv("NETLOOM_CNI_SOCKET"), *run = getenv("NETLOOM_RUN_DIR");

    if (given && *given)
        return (size_t)snprintf(path, room, "%s", given) < room;
    return (size_t)snprintf(path, room, "%s/%s", run && *run ? run : RUN_DIR, SOCKET_NAME) < room;
}

/* The address of a path. One that does not fit goes through its directory's descriptor, which stays open. */
static bool address_of(char *path, struct sockaddr_un *address)
{
    char *slash;
    int directory;

    address->sun_family = AF_UNIX;
    if (strlen(path) < sizeof address->sun_path) {
        (void)strcpy(address->sun_path, path);
        return true;
    }
    slash = strrchr(path, '/');
    if (!slash || slash == path)
        return false;
    *slash = 0;
    directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    return directory >= 0 && (size_t)snprintf(address->sun_path, sizeof address->sun_path, "/proc/self/fd/%d/%s",
                                              directory, slash + 1) < sizeof address->sun_path;
}

/* A connection to the workers of root (or of who we are), or -1. Never waits: a full queue is a refusal. */
static int connect_to_workers(void)
{
    char path[4096];
    struct sockaddr_un address = {0};
    struct ucred peer = {0};
    socklen_t size = sizeof peer;
    int fd;

    if (!socket_path(path, sizeof path) || !address_of(path, &address))
        return -1;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || (peer.uid != 0 && peer.uid != geteuid())) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

static bool send_request(int fd, const struct bytes *request, const int *descriptors, size_t count, int64_t until_ms)
{
    union {
        char room[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {.iov_base = request->data, .iov_len = request->size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);

    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(rights), descriptors, count * sizeof(int));
    while (part.iov_len) {
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN) {
            if (!wait_for(fd, POLLOUT, until_ms))
                return false;
            continue;
        }
        if (sent < 0)
            return false;
        part.iov_base = (uint8_t *)part.iov_base + sent;
        part.iov_len -= (size_t)sent;
        message.msg_control = NULL; /* the descriptors went with the first bytes */
        message.msg_controllen = 0;
    }
    return true;
}

enum received { RECEIVED_SOME, RECEIVED_NOTHING_YET, RECEIVED_END };

static enum received receive(int fd, struct bytes *bytes)
{
    ssize_t got;

    if (!bytes_reserve(bytes, 16384))
        return RECEIVED_END;
    do
        got = recv(fd, bytes->data + bytes->size, bytes->room - bytes->size, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got > 0) {
        bytes->size += (size_t)got;
        return RECEIVED_SOME;
    }
    return got < 0 && errno == EAGAIN ? RECEIVED_NOTHING_YET : RECEIVED_END;
}

/* Receives until there is a frame. PARSED_MORE: there will be none, or the moment passed. */
static enum parsed receive_frame(int fd, struct bytes *bytes, struct frame *frame, int64_t until_ms)
{
    for (;;) {
        enum parsed parsed = frame_parse(bytes->data, bytes->size, frame);
        if (parsed != PARSED_MORE)
            return parsed;
        if (!wait_for(fd, POLLIN, until_ms) || receive(fd, bytes) == RECEIVED_END)
            return PARSED_MORE;
    }
}

/* Whether a worker has taken the request. When false, none has and none ever will. */
static bool is_accepted(int fd, struct bytes *bytes, struct frame *frame, int64_t until_ms)
{
    enum parsed parsed = receive_frame(fd, bytes, frame, until_ms);

    if (parsed == PARSED_MORE) {
        (void)shutdown(fd, SHUT_RD);
        while (receive(fd, bytes) == RECEIVED_SOME)
            ;
        parsed = frame_parse(bytes->data, bytes->size, frame);
    }
    /* A worker sends all of ACCEPTED in one call or does not start, so a piece of it is no ACCEPTED. */
    return parsed == PARSED_FRAME && frame->kind == NETLOOM_KIND_ACCEPTED;
}

static bool send_done(int fd)
{
    uint8_t done[NETLOOM_HEADER_SIZE];
    ssize_t sent;

    header_write(done, NETLOOM_KIND_DONE, 0);
    do
        sent = send(fd, done, sizeof done, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    return sent == sizeof done;
}

/* After ACCEPTED: the answer, whatever it is, is this process's. */
static int answer(int fd, struct bytes *bytes, struct frame *frame, const struct bytes *input)
{
    static const char undelivered[] = "netloom: the worker did not learn that the answer arrived, and undoes the ADD\n";
    const char *verb = getenv("CNI_COMMAND");
    int64_t until_ms = now_ms() + accepted_deadline_ms(frame);
    struct response response;

    bytes->size -= NETLOOM_HEADER_SIZE + frame->length;
    memmove(bytes->data, bytes->data + NETLOOM_HEADER_SIZE + frame->length, bytes->size);
    if (receive_frame(fd, bytes, frame, until_ms) != PARSED_FRAME || !response_parse(frame, &response))
        return fail(input, CNI_TRY_AGAIN_LATER, "the worker that served the request was lost",
                    "whatever it had done of an ADD is undone by the DEL that follows; the log of netloom-cni.service "
                    "tells why it ended");
    (void)write_all(2, response.err.data, response.err.length);
    if (!write_all(1, response.out.data, response.out.length))
        return 1; /* without DONE: the worker undoes an ADD */
    if (!send_done(fd) && verb && strcmp(verb, "ADD") == 0 && response.status == 0) {
        (void)write_all(2, undelivered, sizeof undelivered - 1);
        return 1;
    }
    return (int)response.status;
}

/* Occupies closed standard descriptors, or the socket would be opened there and get the result written to it. Standard
 * output is opened for reading: writing must fail, since nobody will see the result. */
static void guard_descriptors(void)
{
    static const int modes[] = {O_RDONLY, O_RDONLY, O_WRONLY};

    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            (void)open("/dev/null", modes[fd]);
}

static int accept_wait_ms(void)
{
    const char *given = getenv("NETLOOM_CNI_WAIT_MS");
    long value = given ? strtol(given, NULL, 10) : 0;

    return value > 0 && value <= 60000 ? (int)value : ACCEPT_WAIT_MS;
}

int main(int argc, char **argv, char **environment)
{
    static struct bytes input, request, received; /* until the end of the process */
    struct frame frame = {0};
    int descriptors[2], error, fd;
    size_t count;
    int64_t until_ms;
    bool has_input = reads_stdin();

    guard_descriptors();
    (void)signal(SIGPIPE, SIG_IGN);
    program = argc > 0 && strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argc > 0 ? argv[0] : "";
    if (argc != 1) /* somebody at a prompt */
        return cold(argv, environment, &input, false);
    if (has_input) {
        error = read_stdin(&input);
        if (error)
            return fail(&input, CNI_IO_FAILURE, "error reading from stdin", strerror(error));
        if (input.size > NETLOOM_STDIN_LIMIT)
            return fail(&input, CNI_DECODING_FAILURE,
                        "error unmarshall network config: more than 1048576 bytes; make it smaller", "");
    }
    if (!request_make(&request, environment, &input, has_input, descriptors, &count))
        return cold(argv, environment, &input, has_input);
    until_ms = now_ms() + accept_wait_ms();
    fd = connect_to_workers();
    if (fd < 0)
        return cold(argv, environment, &input, has_input);
    /* A worker that refuses early, or is killed, makes sending fail; what it said last counts all the same. */
    (void)send_request(fd, &request, descriptors, count, until_ms);
    if (!is_accepted(fd, &received, &frame, until_ms))
        return cold(argv, environment, &input, has_input);
    return answer(fd, &received, &frame, &input);
}

#endif
