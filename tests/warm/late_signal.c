// Preloaded into a worker: SIGTERM between Python's last look at signals and accept4(2), once for each time that the file
// $NETLOOM_TEST_SIGNAL is made.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags) {
    int (*real)(int, struct sockaddr *, socklen_t *, int) =
        (int (*)(int, struct sockaddr *, socklen_t *, int))dlsym(RTLD_NEXT, "accept4");
    const char *file = getenv("NETLOOM_TEST_SIGNAL");
    if (file && unlink(file) == 0) raise(SIGTERM);
    return real(fd, address, length, flags);
}
