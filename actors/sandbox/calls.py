"""System calls by name: their numbers, and which of them a program has a use for.

A program that computes needs about a hundred of the four hundred. The rest is refused, and counted
by what the caller was after. Each entry is `name:x86_64:aarch64`, the numbers from Linux's
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; `-` where a machine
has no such call.
"""

from __future__ import annotations

import platform

ALLOWED = """
    read:0:63 write:1:64 futex:202:98 mmap:9:222 munmap:11:215 mprotect:10:226 brk:12:214
    lseek:8:62 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70
    fstat:5:80 newfstatat:262:79 stat:4:- lstat:6:- statx:332:291 close:3:57 getdents64:217:61
    readlink:89:- readlinkat:267:78 access:21:- faccessat:269:48 faccessat2:439:439 poll:7:-
    ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20
    epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
    rt_sigsuspend:130:133 sigaltstack:131:132 restart_syscall:219:128 mremap:25:216
    madvise:28:233 msync:26:227 mincore:27:232 membarrier:324:283 rseq:334:293 arch_prctl:158:-
    set_tid_address:218:96 set_robust_list:273:99 dup:32:23 dup2:33:- dup3:292:24 pipe:22:-
    pipe2:293:59 eventfd:284:- eventfd2:290:19 ftruncate:77:46 fsync:74:82 fdatasync:75:83
    fallocate:285:47 fadvise64:221:223 sendfile:40:71 copy_file_range:326:285 splice:275:76
    nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
    gettimeofday:96:169 time:201:- times:100:153 pause:34:- alarm:37:- getitimer:36:102
    setitimer:38:103 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
    getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174 geteuid:107:175 getgid:104:176
    getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgrp:111:-
    getcwd:79:17 uname:63:160 sysinfo:99:179 getrandom:318:278 getrusage:98:165 getrlimit:97:163
    setrlimit:160:164 getcpu:309:168 sched_yield:24:124 exit:60:93 exit_group:231:94 wait4:61:260
    waitid:247:95 umask:95:166 recvfrom:45:207 sendto:44:206 sendmsg:46:211 recvmsg:47:212
    shutdown:48:210 getsockopt:55:209 setsockopt:54:208 getsockname:51:204 getpeername:52:205
    statfs:137:43 fstatfs:138:44
"""
"""Calls that reach nothing but the caller itself and the descriptors it was given."""

QUIET = """
    sched_getaffinity:204:123 mbind:237:235 set_mempolicy:238:237 get_mempolicy:239:236
    getpriority:140:141 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 get_robust_list:274:100
    sched_setaffinity:203:122
"""
"""Calls that honest libraries try and do without; refused and not counted."""

BY_ARGUMENT = """
    clone:56:220 clone3:435:435 kill:62:129 tgkill:234:131 prlimit64:302:261 open:2:-
    openat:257:56 openat2:437:437 fcntl:72:25 ioctl:16:29 prctl:157:167 socketpair:53:199
    seccomp:317:277
"""
"""Calls that their arguments decide, see `actors.sandbox.confinement`."""

PROCESSES, NETWORK, FILES, KERNEL = "processes", "network", "files", "kernel"
"""What a refused call was after. `kernel` is everything that has no name here."""

REFUSED = {
    PROCESSES: """
    fork:57:- vfork:58:- execve:59:221 execveat:322:281 tkill:200:130 rt_sigqueueinfo:129:138
    rt_tgsigqueueinfo:297:240 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271
    process_madvise:440:440 process_mrelease:448:448 pidfd_open:434:434 pidfd_getfd:438:438
    pidfd_send_signal:424:424 kcmp:312:272 setpriority:141:140 sched_setattr:314:274
    sched_setparam:142:118 sched_setscheduler:144:119 ioprio_set:251:30 move_pages:279:239
    migrate_pages:256:238 setpgid:109:154 setsid:112:157 setns:308:268 unshare:272:97
""",
    NETWORK: """
    socket:41:198 connect:42:203 bind:49:200 listen:50:201 accept:43:202 accept4:288:242
    sendmmsg:307:269 recvmmsg:299:243 io_uring_setup:425:425 io_uring_enter:426:426
    io_uring_register:427:427
""",
    FILES: """
    creat:85:- truncate:76:45 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:-
    mkdirat:258:34 rmdir:84:- link:86:- linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:-
    symlinkat:266:36 chmod:90:- fchmod:91:52 fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:-
    fchownat:260:54 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:- mknod:133:-
    mknodat:259:33 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14
    lremovexattr:198:15 fremovexattr:199:16 flock:73:32 name_to_handle_at:303:264
    open_by_handle_at:304:265 memfd_create:319:279 memfd_secret:447:447 inotify_init:253:-
    inotify_init1:294:26 fanotify_init:300:262 shmget:29:194 shmat:30:196 shmctl:31:195
    semget:64:190 msgget:68:186 mq_open:240:180 chdir:80:49 fchdir:81:50 fchmodat2:452:452
""",
}

MACHINES = {"x86_64": 0, "aarch64": 1}


def numbers(table: str, machine: str | None = None) -> dict[str, int]:
    """The calls of a table that `machine` (this one) has: name to number."""
    column = MACHINES[machine or platform.machine()]
    found = {}
    for entry in table.split():
        name, *of_machines = entry.split(":")
        if of_machines[column] != "-":
            found[name] = int(of_machines[column])
    return found


def purposes(machine: str | None = None) -> dict[int, str]:
    """What a refused call is after, by its number; one that is not here is after the kernel."""
    named = {
        number: kind
        for kind, table in REFUSED.items()
        for number in numbers(table, machine).values()
    }
    special = numbers(BY_ARGUMENT, machine)
    for kind, names in (
        (PROCESSES, ("clone", "kill", "tgkill", "prlimit64")),
        (FILES, ("open", "openat", "fcntl")),
        (NETWORK, ("socketpair",)),
    ):
        named |= {special[name]: kind for name in names if name in special}
    return named
