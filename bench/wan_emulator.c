/* Hosts of a made-up wide area network: a TUN device in each of some network namespaces, and packets between them that
 * leave at a host's rate and arrive after a delay. Kernels without sch_netem, as containers often have, can do no better.
 *
 *     wan_emulator NAMESPACE ADDRESS [NAMESPACE ADDRESS ...]
 *
 * Prints "ready", then takes lines "DELAY_US RATE_MBIT" (one way; rate 0 for none), answers each with "set", and ends
 * with its input. bench/wan_hosts.py builds and runs it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_HOSTS = 32, QUEUE = 1 << 14, PACKET = 1 << 16, AT_ONCE = 64 };

typedef struct {
    uint64_t due_ns;
    int to, length;
    char *bytes;
} Packet;

/* A host sends through one line, so its packets are due in the order in which they were sent. */
typedef struct {
    int device;
    uint32_t address;
    uint64_t line_free_ns;
    unsigned first, behind_last;
    Packet queue[QUEUE];
} Host;

static Host hosts[MOST_HOSTS];
static int num_hosts;
static uint64_t delay_ns;
static double rate_mbit;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void open_host(const char *name, const char *address, int own_namespace) {
    char path[300];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int there = open(path, O_RDONLY);
    if (there < 0 || setns(there, CLONE_NEWNET)) fail(path);
    close(there);
    Host *host = &hosts[num_hosts++];
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, "wan0");
    host->device = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (host->device < 0 || ioctl(host->device, TUNSETIFF, &request)) fail("tun device");
    host->address = inet_addr(address);
    if (setns(own_namespace, CLONE_NEWNET)) fail("own namespace");
}

/* Hands on what is due; returns when the next packet is, 0 for none. */
static uint64_t deliver(void) {
    uint64_t now = now_ns(), next = 0;
    for (Host *host = hosts; host < hosts + num_hosts; host++) {
        for (; host->first != host->behind_last; host->first++) {
            Packet *packet = &host->queue[host->first % QUEUE];
            if (packet->due_ns > now) {
                if (!next || packet->due_ns < next) next = packet->due_ns;
                break;
            }
            if (write(hosts[packet->to].device, packet->bytes, packet->length) < 0 && errno != EAGAIN) fail("write");
            free(packet->bytes);
        }
    }
    return next;
}

static void take(Host *host) {
    static char bytes[PACKET];
    for (int count = 0; count < AT_ONCE; count++) {
        int length = read(host->device, bytes, sizeof bytes), to = 0;
        if (length <= 0) return;
        if (length < 20 || bytes[0] >> 4 != 4) continue;
        uint32_t address;
        memcpy(&address, bytes + 16, sizeof address);
        while (to < num_hosts && hosts[to].address != address) to++;
        if (to == num_hosts || host->behind_last - host->first >= QUEUE) continue; /* dropped, as a router would */
        uint64_t now = now_ns(), begun = host->line_free_ns > now ? host->line_free_ns : now;
        host->line_free_ns = begun + (rate_mbit > 0 ? (uint64_t)(length * 8000.0 / rate_mbit) : 0);
        Packet *packet = &host->queue[host->behind_last++ % QUEUE];
        *packet = (Packet){host->line_free_ns + delay_ns, to, length, malloc(length)};
        memcpy(packet->bytes, bytes, length);
    }
}

int main(int count, char **words) {
    int own_namespace = open("/proc/self/ns/net", O_RDONLY);
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    for (int word = 1; word + 1 < count && num_hosts < MOST_HOSTS; word += 2)
        open_host(words[word], words[word + 1], own_namespace);
    printf("ready\n");
    fflush(stdout);
    struct pollfd polled[MOST_HOSTS + 1];
    for (int index = 0; index < num_hosts; index++)
        polled[index] = (struct pollfd){.fd = hosts[index].device, .events = POLLIN};
    polled[num_hosts] = (struct pollfd){.fd = 0, .events = POLLIN};
    char line[200];
    size_t filled = 0;
    for (;;) {
        uint64_t next = deliver(), now = now_ns(), wait = next > now ? next - now : 0;
        struct timespec pause = {wait / 1000000000u, wait % 1000000000u};
        if (ppoll(polled, num_hosts + 1, next ? &pause : NULL, NULL) < 0 && errno != EINTR) fail("poll");
        for (int index = 0; index < num_hosts; index++)
            if (polled[index].revents & POLLIN) take(&hosts[index]);
        if (polled[num_hosts].revents & (POLLIN | POLLHUP)) {
            ssize_t got = read(0, line + filled, sizeof line - 1 - filled);
            if (got <= 0) return 0;
            filled += got;
            line[filled] = 0;
            if (strchr(line, '\n')) {
                double delay_us, rate;
                if (sscanf(line, "%lf %lf", &delay_us, &rate) == 2) {
                    delay_ns = (uint64_t)(delay_us * 1000);
                    rate_mbit = rate;
                    printf("set\n");
                    fflush(stdout);
                }
                filled = 0;
            }
        }
    }
}
