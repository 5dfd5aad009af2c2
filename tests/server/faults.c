/* A medium and a clock that misbehave, for a process that loads this first (LD_PRELOAD).

   Segment files of the KV cache alone are meddled with, and Triton's stubs alone see another time of day. What happens
   is the word in the file that KV_FAULTS names, read anew at every call: "fail" (reads give EIO), "flip" (a bit of what
   was read), "hang" (reads wait until the word changes), "refuse" (writes give EIO), "clock SECONDS" (added to it). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void read_word(char *word, size_t size) {
    const char *path = getenv("KV_FAULTS");
    ssize_t length = -1;
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        length = read(fd, word, size - 1);
        close(fd);
    }
    word[length > 0 ? length : 0] = 0;
}

static int is_segment(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, ".segment") != NULL;
}

static int word_is(const char *wanted) {
    char word[64];
    read_word(word, sizeof word);
    return strncmp(word, wanted, strlen(wanted)) == 0;
}

typedef ssize_t (*transfer)(int, const struct iovec *, int, off_t, int);

static ssize_t faulty_read(const char *name, int fd, const struct iovec *to, int count, off_t offset, int flags) {
    transfer call = (transfer)real(name);
    if (!is_segment(fd)) return call(fd, to, count, offset, flags);
    while (word_is("hang")) usleep(20000);
    if (word_is("fail")) {
        errno = EIO;
        return -1;
    }
    ssize_t found = call(fd, to, count, offset, flags);
    if (found > 0 && word_is("flip")) ((char *)to[count - 1].iov_base)[0] ^= 4;
    return found;
}

static ssize_t faulty_write(const char *name, int fd, const struct iovec *from, int count, off_t offset, int flags) {
    transfer call = (transfer)real(name);
    if (is_segment(fd) && word_is("refuse")) {
        errno = EIO;
        return -1;
    }
    return call(fd, from, count, offset, flags);
}

/* What Python's os.preadv and os.pwritev call, by C library and build; without flags a further argument is ignored. */
#define PLAIN(name, faulty) \
    ssize_t name(int fd, const struct iovec *part, int count, off_t at) { return faulty(#name, fd, part, count, at, 0); }
#define FLAGGED(name, faulty) \
    ssize_t name(int fd, const struct iovec *part, int count, off_t at, int flags) { \
        return faulty(#name, fd, part, count, at, flags); \
    }
PLAIN(preadv, faulty_read)
PLAIN(preadv64, faulty_read)
FLAGGED(preadv2, faulty_read)
FLAGGED(preadv64v2, faulty_read)
PLAIN(pwritev, faulty_write)
PLAIN(pwritev64, faulty_write)
FLAGGED(pwritev2, faulty_write)
FLAGGED(pwritev64v2, faulty_write)

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*call)(clockid_t, struct timespec *);
    static int is_stub = -1;
    if (!call) call = real("clock_gettime");
    int result = call(clock, now);
    if (clock != CLOCK_REALTIME || result) return result;
    if (is_stub < 0) {
        char path[4096];
        ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
        path[length > 0 ? length : 0] = 0;
        is_stub = strstr(path, "python_backend_stub") != NULL;
    }
    char word[64];
    long seconds;
    if (is_stub) {
        read_word(word, sizeof word);
        if (sscanf(word, "clock %ld", &seconds) == 1) now->tv_sec += seconds;
    }
    return result;
}
