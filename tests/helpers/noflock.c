/* Takes flock and record locks away below a folder, as mounts without locks do; preloaded (LD_PRELOAD).
   FLOCK_UNDER names the folder, FLOCK_ERRNO what is said: 38 ENOSYS, 37 ENOLCK, 95 EOPNOTSUPP. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int taken_away(int descriptor) {
    char link[64], path[PATH_MAX];
    const char *under = getenv("FLOCK_UNDER"), *number = getenv("FLOCK_ERRNO");
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (!under || size < 0) return 0;
    path[size] = 0;
    if (strncmp(path, under, strlen(under))) return 0;
    errno = number ? atoi(number) : ENOSYS;
    return 1;
}

int flock(int descriptor, int operation) {
    int (*next)(int, int) = dlsym(RTLD_NEXT, "flock");
    return taken_away(descriptor) ? -1 : next(descriptor, operation);
}

static int control(const char *name, int descriptor, int command, void *argument) {
    int (*next)(int, int, ...) = dlsym(RTLD_NEXT, name);
    int locks = command == F_SETLK || command == F_SETLKW || command == F_GETLK;
    return locks && taken_away(descriptor) ? -1 : next(descriptor, command, argument);
}

int fcntl(int descriptor, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control("fcntl", descriptor, command, argument);
}

int fcntl64(int descriptor, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control("fcntl64", descriptor, command, argument);
}
