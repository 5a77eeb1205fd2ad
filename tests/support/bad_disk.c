/*
 * A disk that fails when it is told to, for a program that knows nothing of it (LD_PRELOAD).
 *
 * It counts what the process does to its store (store.db and the files beside it), and at the N-th time kills the
 * process, tears the write, or answers with an error. What is counted from when on, and what is done, the test writes
 * into a small file that both have mapped; its layout is that of `bad_disk.rs`. It never changes what it does not count.
 *
 *   scope COMMITS   a transaction of SQLite's write-ahead log: from its first page to the flush after the last one.
 *                   The sign of life that an engine writes each second is none: it is the transaction of one page,
 *                   which page that is is learned before counting begins.
 *   scope CALLS     every pwrite, write, ftruncate, fsync and fdatasync.
 *   scope FLUSHES   every fsync and fdatasync.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { COMMITS = 0, CALLS = 1, FLUSHES = 2 };
enum { NOTHING = 0, DIE_BEFORE = 1, DIE_AFTER = 2, TEAR = 3, FAIL = 4 };
enum { WAL_HEADER_BYTES = 32, FRAME_HEADER_BYTES = 24 };

struct control {
    volatile uint32_t target;     /* at which one; 0: count only */
    volatile uint32_t deed;       /* what is done then */
    volatile uint32_t scope;      /* what is counted */
    volatile uint32_t error;      /* for FAIL: the errno */
    volatile uint32_t failures;   /* for FAIL: how many calls from there on; UINT32_MAX: all */
    volatile uint32_t counting;   /* 1: count */
    volatile uint32_t counted;    /* told: how many there were */
    volatile uint32_t done;       /* told: how often the deed was done */
    volatile uint32_t renew_page; /* told: the page that a sign of life writes; 0: not known yet */
};

static struct control *control;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t page_of_frame, pages, first_page;
static int in_commit, is_counted;

static ssize_t (*real_pwrite)(int, const void *, size_t, off64_t);
static ssize_t (*real_write)(int, const void *, size_t);
static int (*real_fsync)(int), (*real_fdatasync)(int), (*real_ftruncate)(int, off64_t);

__attribute__((constructor)) static void begin(void) {
    real_pwrite = (ssize_t(*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
    real_write = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    real_fsync = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    real_ftruncate = (int (*)(int, off64_t))dlsym(RTLD_NEXT, "ftruncate64");
    const char *path = getenv("BAD_DISK");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED) control = at;
}

/* 0: not ours, 1: a file of the store, 2: its write-ahead log. */
static int kind_of(int fd) {
    char link[32], path[PATH_MAX];
    if (!control) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    const char *name = strrchr(path, '/');
    if (!name) return 0;
    if (!strcmp(name, "/store.db-wal")) return 2;
    return !strcmp(name, "/store.db") ? 1 : 0;
}

static void die(void) {
    control->done++;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* What is done at a call that is the counted-th of its scope, before it is made. */
static int due(void) {
    uint32_t target = control->target, at = control->counted;
    if (!control->counting || !target || !control->deed) return NOTHING;
    if (control->deed == FAIL) {
        int is_due = at >= target && control->done < control->failures;
        return is_due ? FAIL : NOTHING;
    }
    return at == target ? (int)control->deed : NOTHING;
}

struct write_call { int fd; const void *bytes; size_t length; off64_t at; int has_place; };

static ssize_t make(const struct write_call *call, size_t length) {
    return call->has_place ? real_pwrite(call->fd, call->bytes, length, call->at)
                           : real_write(call->fd, call->bytes, length);
}

static ssize_t written(const struct write_call *call, int now) {
    if (now == DIE_BEFORE) die();
    if (now == TEAR) {
        make(call, call->length / 2);
        die();
    }
    if (now == FAIL) {
        control->done++;
        in_commit = is_counted = 0; /* it is rolled back: what comes next is another one */
        errno = (int)control->error;
        return -1;
    }
    ssize_t result = make(call, call->length);
    if (now == DIE_AFTER) die();
    return result;
}

/* Follows the frames of the write-ahead log; whether this call begins a transaction that counts. */
static int begins_commit(const struct write_call *call) {
    if (call->length == WAL_HEADER_BYTES) return 0;
    if (call->length == FRAME_HEADER_BYTES) {
        const unsigned char *b = call->bytes;
        page_of_frame = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
        if (!in_commit) {
            in_commit = 1;
            pages = 0;
            first_page = page_of_frame;
        }
        pages++;
    }
    if (!in_commit || is_counted || page_of_frame == control->renew_page) return 0;
    is_counted = control->counting && control->scope == COMMITS;
    return is_counted;
}

static ssize_t on_write(const struct write_call *call) {
    int kind = kind_of(call->fd);
    if (!kind) return make(call, call->length);
    pthread_mutex_lock(&lock);
    int now = NOTHING;
    if (control->scope == COMMITS) {
        int begins = kind == 2 && begins_commit(call);
        if (begins) control->counted++;
        /* What is done after a commit is done at its flush; a torn one has its first page torn. */
        now = is_counted ? due() : NOTHING;
        if (now == DIE_AFTER || (now == TEAR && call->length <= WAL_HEADER_BYTES)) now = NOTHING;
    } else if (control->scope == CALLS && control->counting) {
        control->counted++;
        now = due();
    }
    ssize_t result = written(call, now);
    pthread_mutex_unlock(&lock);
    return result;
}

static int on_flush(int fd, int (*real)(int)) {
    int kind = kind_of(fd);
    if (!kind) return real(fd);
    pthread_mutex_lock(&lock);
    int now = NOTHING;
    if (control->scope == COMMITS) {
        if (kind == 2 && in_commit) {
            now = is_counted && control->deed == DIE_AFTER ? due() : NOTHING;
            if (!control->counting && pages == 1) control->renew_page = first_page;
            in_commit = is_counted = 0;
        }
    } else if (control->counting) {
        control->counted++;
        now = due();
        /* A full disk takes no more, and keeps what it has taken: the next write is the one that fails. */
        if (now == FAIL && control->error == ENOSPC) now = NOTHING;
    }
    if (now == DIE_BEFORE || now == TEAR) die();
    int result = 0;
    if (now == FAIL) {
        control->done++;
        errno = (int)control->error;
        result = -1;
    } else {
        result = real(fd);
        if (now == DIE_AFTER) die();
    }
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
    struct write_call call = {fd, bytes, length, at, 1};
    return on_write(&call);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return pwrite64(fd, bytes, length, at); }

ssize_t write(int fd, const void *bytes, size_t length) {
    struct write_call call = {fd, bytes, length, 0, 0};
    /* Others may write before we have begun. */
    return real_write ? on_write(&call) : syscall(SYS_write, fd, bytes, length);
}

int fsync(int fd) { return on_flush(fd, real_fsync); }

int fdatasync(int fd) { return on_flush(fd, real_fdatasync); }

int ftruncate64(int fd, off64_t length) {
    if (!kind_of(fd) || control->scope != CALLS || !control->counting) return real_ftruncate(fd, length);
    pthread_mutex_lock(&lock);
    control->counted++;
    int now = due();
    if (now == DIE_BEFORE || now == TEAR) die();
    int result = -1;
    if (now == FAIL) {
        control->done++;
        errno = (int)control->error;
    } else {
        result = real_ftruncate(fd, length);
        if (now == DIE_AFTER) die();
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }
