/* The clock of one machine, as processes that load this before the C library see it.
 *
 *     cc -shared -fPIC -O2 false_clock.c -o clock.so -ldl
 *     LD_PRELOAD=clock.so RINGMO_TEST_CLOCK=FILE program
 *
 * FILE holds eight bytes, by how many seconds the time of day is ahead (an int64 of this machine's
 * order); it may change while the program runs. What counts from the machine's start goes on as it
 * is, as it does where somebody sets the time of day. So do the times of files: the kernel sets them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *ahead;
static int (*of_kernel)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    of_kernel = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("RINGMO_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *bytes = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (bytes != MAP_FAILED)
        ahead = bytes;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!of_kernel)
        of_kernel = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = of_kernel(clock, now);
    if (!failed && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *ahead;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    if (!failed)
        *now = (struct timeval){precise.tv_sec, precise.tv_nsec / 1000};
    return failed;
}

time_t time(time_t *kept) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (kept)
        *kept = now.tv_sec;
    return now.tv_sec;
}
