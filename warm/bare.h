/* What the launcher uses of libc, without libc (-DNETLOOM_BARE -nostdlib, x86_64): types and numbers are libc's headers',
 * functions are these, under names of their own by which libc's are replaced.
 *
 * Before main, libc asks the processor some sixty things (cpuid) to choose among its string functions. In a virtual
 * machine each of them goes to the hypervisor: a third of a millisecond in all, half of what the launcher takes. */
#ifndef NETLOOM_BARE_H
#define NETLOOM_BARE_H

#include <stdarg.h>
#include <sys/syscall.h>

#ifndef __x86_64__
#error "a launcher without libc is written for x86_64 alone; build it without -DNETLOOM_BARE"
#endif

/* The kernel. */

static int bare_errno;
static char **bare_environment;

static long bare_raw(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static long bare_call(long number, long a, long b, long c, long d, long e, long f)
{
    long result = bare_raw(number, a, b, c, d, e, f);

    if (result >= 0 || result < -4095)
        return result;
    bare_errno = (int)-result;
    return -1;
}

static int bare_open(const char *path, int flags)
{
    return (int)bare_call(SYS_open, (long)path, flags, 0, 0, 0, 0);
}

static int bare_close(int fd)
{
    return (int)bare_call(SYS_close, fd, 0, 0, 0, 0, 0);
}

static ssize_t bare_read(int fd, void *data, size_t size)
{
    return bare_call(SYS_read, fd, (long)data, (long)size, 0, 0, 0);
}

static ssize_t bare_write(int fd, const void *data, size_t size)
{
    return bare_call(SYS_write, fd, (long)data, (long)size, 0, 0, 0);
}

static off_t bare_lseek(int fd, off_t offset, int whence)
{
    return bare_call(SYS_lseek, fd, offset, whence, 0, 0, 0);
}

static int bare_dup2(int from, int to)
{
    return (int)bare_call(SYS_dup2, from, to, 0, 0, 0, 0);
}

static int bare_fcntl(int fd, int what)
{
    return (int)bare_call(SYS_fcntl, fd, what, 0, 0, 0, 0);
}

static int bare_stat(const char *path, struct stat *status)
{
    return (int)bare_call(SYS_stat, (long)path, (long)status, 0, 0, 0, 0);
}

static mode_t bare_umask(mode_t mask)
{
    return (mode_t)bare_call(SYS_umask, (long)mask, 0, 0, 0, 0, 0);
}

static uid_t bare_geteuid(void)
{
    return (uid_t)bare_call(SYS_geteuid, 0, 0, 0, 0, 0, 0);
}

static int bare_poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
    return (int)bare_call(SYS_poll, (long)fds, (long)count, timeout_ms, 0, 0, 0);
}

static int bare_clock_gettime(clockid_t clock, struct timespec *now)
{
    return (int)bare_call(SYS_clock_gettime, clock, (long)now, 0, 0, 0, 0);
}

static int bare_memfd_create(const char *name, unsigned int flags)
{
    return (int)bare_call(SYS_memfd_create, (long)name, flags, 0, 0, 0, 0);
}

static int bare_execve(const char *path, char *const *argv, char *const *environment)
{
    return (int)bare_call(SYS_execve, (long)path, (long)argv, (long)environment, 0, 0, 0);
}

static int bare_socket(int domain, int type, int protocol)
{
    return (int)bare_call(SYS_socket, domain, type, protocol, 0, 0, 0);
}

static int bare_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    return (int)bare_call(SYS_connect, fd, (long)address, size, 0, 0, 0);
}

static int bare_shutdown(int fd, int how)
{
    return (int)bare_call(SYS_shutdown, fd, how, 0, 0, 0, 0);
}

static int bare_getsockopt(int fd, int level, int option, void *value, socklen_t *size)
{
    return (int)bare_call(SYS_getsockopt, fd, level, option, (long)value, (long)size, 0);
}

static ssize_t bare_sendmsg(int fd, const struct msghdr *message, int flags)
{
    return bare_call(SYS_sendmsg, fd, (long)message, flags, 0, 0, 0);
}

static ssize_t bare_send(int fd, const void *data, size_t size, int flags)
{
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    return bare_sendmsg(fd, &message, flags);
}

static ssize_t bare_recv(int fd, void *data, size_t size, int flags)
{
    struct iovec part = {.iov_base = data, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    return bare_call(SYS_recvmsg, fd, (long)&message, flags, 0, 0, 0);
}

/* SIG_IGN and SIG_DFL alone: the kernel wants more for a handler. */
static void bare_signal(int number, void (*what)(int))
{
    const struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        uint64_t mask;
    } action = {.handler = what};

    (void)bare_call(SYS_rt_sigaction, number, (long)&action, 0, sizeof action.mask, 0, 0);
}

/* Text and memory. The compiler itself calls the first four; what keeps a loop from becoming a call of the function that
 * it is in is the empty statement in it. */

#define BARE_LOOP __asm__ volatile("")

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    void *start = to;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return start;
}

void *memmove(void *to, const void *from, size_t size)
{
    uint8_t *target = to;
    const uint8_t *source = from;

    if (target <= source || target >= source + size)
        return memcpy(to, from, size);
    while (size--) {
        BARE_LOOP;
        target[size] = source[size];
    }
    return to;
}

void *memset(void *to, int value, size_t size)
{
    void *start = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return start;
}

int memcmp(const void *one, const void *other, size_t size)
{
    const uint8_t *left = one, *right = other;

    for (size_t i = 0; i < size; i++) {
        BARE_LOOP;
        if (left[i] != right[i])
            return left[i] - right[i];
    }
    return 0;
}

size_t strlen(const char *text)
{
    size_t length = 0;

    while (text[length]) {
        BARE_LOOP;
        length++;
    }
    return length;
}

static int bare_strcmp(const char *one, const char *other)
{
    while (*one && *one == *other)
        one++, other++;
    return (unsigned char)*one - (unsigned char)*other;
}

static char *bare_strcpy(char *to, const char *from)
{
    return memcpy(to, from, strlen(from) + 1);
}

static char *bare_strrchr(const char *text, int wanted)
{
    const char *found = NULL;

    for (; *text; text++)
        if (*text == wanted)
            found = text;
    return (char *)(uintptr_t)found;
}

static void *bare_memmem(const void *data, size_t size, const void *wanted, size_t length)
{
    const uint8_t *at = data;

    for (; size >= length; at++, size--)
        if (memcmp(at, wanted, length) == 0)
            return (void *)(uintptr_t)at;
    return NULL;
}

/* Decimal, without blanks or a sign; what is none is 0, and what is too large is large. */
static long bare_strtol(const char *text)
{
    long value = 0;

    for (; *text >= '0' && *text <= '9'; text++)
        value = value > 1000000000 ? value : value * 10 + (*text - '0');
    return *text ? 0 : value;
}

static char *bare_getenv(const char *name)
{
    size_t length = strlen(name);

    for (char **one = bare_environment; *one; one++)
        if (memcmp(*one, name, length < strlen(*one) ? length : strlen(*one)) == 0 && (*one)[length] == '=')
            return *one + length + 1;
    return NULL;
}

/* %s and %d. */
__attribute__((format(printf, 3, 4))) static int bare_snprintf(char *to, size_t room, const char *format, ...)
{
    size_t length = 0;
    va_list values;

    va_start(values, format);
    for (; *format; format++) {
        char digits[12], *text = digits + sizeof digits - 1;
        *text = 0;
        if (*format != '%') {
            *--text = *format;
        } else if (*++format == 's') {
            text = va_arg(values, char *);
        } else {
            int number = va_arg(values, int);
            unsigned int rest = number < 0 ? 0U - (unsigned int)number : (unsigned int)number;
            do
                *--text = (char)('0' + rest % 10);
            while (rest /= 10);
            if (number < 0)
                *--text = '-';
        }
        for (; *text; text++, length++)
            if (length + 1 < room)
                to[length] = *text;
    }
    va_end(values);
    if (room)
        to[length + 1 < room ? length : room - 1] = 0;
    return (int)length;
}

/* What can be wrong with standard input, a memfd or an execve. */
static const char *bare_strerror(int number)
{
    static const struct {
        int number;
        const char *text;
    } known[] = {
        {EPERM, "Operation not permitted"},
        {ENOENT, "No such file or directory"},
        {EIO, "Input/output error"},
        {ENXIO, "No such device or address"},
        {E2BIG, "Argument list too long"},
        {ENOEXEC, "Exec format error"},
        {EBADF, "Bad file descriptor"},
        {ENOMEM, "Cannot allocate memory"},
        {EACCES, "Permission denied"},
        {ENOTDIR, "Not a directory"},
        {EISDIR, "Is a directory"},
        {EINVAL, "Invalid argument"},
        {ENFILE, "Too many open files in system"},
        {EMFILE, "Too many open files"},
        {ETXTBSY, "Text file busy"},
        {ENOSPC, "No space left on device"},
        {ENOSYS, "Function not implemented"},
        {ELOOP, "Too many levels of symbolic links"},
        {ENAMETOOLONG, "File name too long"},
        {ELIBBAD, "Accessing a corrupted shared library"},
    };
    static char other[32];

    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].number == number)
            return known[i].text;
    (void)bare_snprintf(other, sizeof other, "Unknown error %d", number);
    return other;
}

/* A mapping for each, which begins with its own size. Nothing is given back before the process ends. */
static void *bare_realloc(void *data, size_t size)
{
    size_t whole = size + 16, *start = data ? (size_t *)data - 2 : NULL;
    long made = start ? bare_call(SYS_mremap, (long)start, (long)*start, (long)whole, MREMAP_MAYMOVE, 0, 0)
                      : bare_call(SYS_mmap, 0, (long)whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (made == -1)
        return NULL;
    *(size_t *)made = whole;
    return (size_t *)made + 2;
}

#undef errno
#define errno bare_errno
#define open bare_open
#define close bare_close
#define read bare_read
#define write bare_write
#define lseek bare_lseek
#define dup2 bare_dup2
#define fcntl bare_fcntl
#define stat(path, status) bare_stat(path, status)
#define umask bare_umask
#define geteuid bare_geteuid
#define poll(fds, count, timeout_ms) bare_poll(fds, count, timeout_ms)
#define clock_gettime bare_clock_gettime
#define memfd_create bare_memfd_create
#define execve bare_execve
#define socket bare_socket
#define connect bare_connect
#define shutdown bare_shutdown
#define getsockopt bare_getsockopt
#define sendmsg bare_sendmsg
#define send bare_send
#define recv bare_recv
#define signal bare_signal
#define strcmp bare_strcmp
#define strcpy bare_strcpy
#define strrchr bare_strrchr
#define memmem bare_memmem
#define strtol(text, end, base) bare_strtol(text)
#define getenv bare_getenv
#define snprintf bare_snprintf
#define strerror bare_strerror
#define realloc bare_realloc

/* Where the kernel begins: the stack holds the count of arguments, the arguments, NULL, the environment, NULL. */

int main(int argc, char **argv, char **environment);

__attribute__((noreturn, used)) static void bare_main(long *stack)
{
    char **argv = (char **)(stack + 1);

    bare_environment = argv + *stack + 1;
    int status = main((int)*stack, argv, bare_environment);
    for (;;)
        (void)bare_raw(SYS_exit_group, status, 0, 0, 0, 0, 0);
}

__asm__(".globl _start\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call bare_main\n");

#endif
