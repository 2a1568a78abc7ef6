"""Programs that mean harm, and what must become of each. Standard library only: other users' Pythons run it.

As a script it runs them in a sandbox of some layers and prints what became of them as JSON.
"""

import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

REFUSED = {"failed", "forbidden"}
"""Where a file is outside: there is no such file, or no permission."""


def refuses(action: str, imports: str = "os") -> tuple[str, set[str]]:
    """A program that does one thing, which must raise an OSError; anything else is told."""
    return (
        f"import {imports}\ntry:\n    {action}\nexcept OSError:\n    raise\nraise SystemExit('REACHED')",
        REFUSED,
    )


def programs(outside: str, parent: int) -> dict[str, tuple[str, set[str]]]:
    """Source and the verdicts that are right, by name.

    Args:
        outside: A folder with a file ``secret`` that everybody may read and write.
        parent: A process that must not be reached.
    """
    secret = f"{outside}/secret"
    home, repository = os.path.expanduser("~"), os.path.abspath(f"{__file__}/../../../../..")
    found: dict[str, tuple[str, set[str]]] = {
        # -- time
        "endless loop": ("while True: pass", {"timeout"}),
        "sleep": ("import time; time.sleep(1000)", {"timeout"}),
        "loop that catches everything": (
            "import signal\nfor number in range(1, 65):\n"
            "    try: signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            {"timeout"},
        ),
        "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
        "fork bomb that goes on": (
            "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
            {"timeout"},
        ),
        # -- processes
        "fork bomb": ("import os\nwhile True: os.fork()", {"forbidden"}),
        "shell": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'echo'])", REFUSED),
        "system": ("import os; assert os.system('true') == 0", {"failed"}),
        "spawn": refuses("os.posix_spawn('/bin/sh', ['sh'], {})"),
        "exec": refuses("os.execv('/bin/sh', ['sh', '-c', 'echo'])"),
        "exec of Python": refuses("os.execv(sys.executable, [sys.executable, '-c', ''])", "os, sys"),
        "multiprocessing": (
            "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
            REFUSED,
        ),
        "thread bomb": (
            "import threading, time\nthreading.stack_size(32768)\nmade = 0\n"
            "try:\n    while True:\n"
            "        threading.Thread(target=time.sleep, args=(100,), daemon=True).start(); made += 1\n"
            "except RuntimeError: pass\nassert made <= 256, made\nraise SystemExit('bounded')",
            {"failed"},
        ),
        # -- memory
        "10 GB": ("x = bytearray(10**10)", {"memory"}),
        "10 GB in parts": ("x = []\nwhile True: x.append(bytearray(10**7))", {"memory"}),
        "10 GB mapped": ("import mmap; mmap.mmap(-1, 10**10)", {"memory"}),
        "memory file": refuses("os.memfd_create('x')"),
        # -- files
        "10 GB file": (
            "with open('x', 'wb', buffering=0) as f:\n    while True: f.write(bytes(10**7))",
            {"output limit", "forbidden"},
        ),
        "10 GB of files": (
            "i = 0\nwhile True:\n    i += 1\n"
            "    with open(str(i), 'wb', buffering=0) as f: f.write(bytes(10**6))",
            {"output limit", "forbidden"},
        ),
        "a million files": (
            "i = 0\nwhile True:\n    open(str(i), 'w').close()\n    i += 1",
            {"output limit", "forbidden"},
        ),
        "read shadow": refuses("open('/etc/shadow').read()"),
        "read a secret": refuses(f"open({secret!r}).read()"),
        "read the environment": refuses(f"open('/proc/{parent}/environ').read()"),
        "read memory": refuses("open('/proc/self/mem', 'rb')"),
        "read the repository": refuses(f"open({repository + '/pyproject.toml'!r}).read()"),
        "list home": refuses(f"os.listdir({home!r})"),
        "list a folder": refuses(f"os.listdir({outside!r})"),
        "write a secret": refuses(f"open({secret!r}, 'w')"),
        "append to a secret": refuses(f"open({secret!r}, 'a')"),
        "truncate a secret": refuses(f"os.truncate({secret!r}, 0)"),
        "truncate by opening": refuses(f"os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)"),
        "remove a secret": refuses(f"os.unlink({secret!r})"),
        "rename a secret": refuses(f"os.rename({secret!r}, 'x')"),
        "link a secret": refuses(f"os.link({secret!r}, 'x'); open('x').read()"),
        "follow a link": refuses(f"os.symlink({secret!r}, 'x'); open('x').read()"),
        "leave upwards": refuses(f"open('../../../../../..{secret}').read()"),
        "open the writable root": refuses("open('/x', 'w')"),
        "write home": refuses(f"open({home + '/memlm_was_here'!r}, 'w')"),
        "write the repository": refuses(f"open({repository + '/memlm_was_here'!r}, 'w')"),
        "write shared memory": refuses("open('/dev/shm/memlm_was_here', 'w')"),
        "write etc": refuses("open('/etc/memlm_was_here', 'w')"),
        "write the library": refuses("open(os.path.dirname(os.__file__) + '/memlm_was_here.py', 'w')"),
        "write var tmp": refuses("open('/var/tmp/memlm_was_here', 'w')"),
        "make a folder": refuses(f"os.mkdir({outside + '/memlm_was_here'!r})"),
        "make a pipe": refuses(f"os.mkfifo({outside + '/memlm_was_here'!r})"),
        "change a mode": refuses(f"os.chmod({secret!r}, 0)"),
        "change an owner": refuses(f"os.chown({secret!r}, 0, 0)"),
        "change times": refuses(f"os.utime({secret!r}, (0, 0))"),
        "change attributes": refuses(f"os.setxattr({secret!r}, 'user.x', b'x')"),
        "remove the folder": (
            "import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True); os.rmdir(os.getcwd())",
            REFUSED,
        ),
        "read a disk": refuses("os.open(next(e.path for e in os.scandir('/dev') if 'da' in e.name), 0)"),
        # -- network
        "TCP": refuses("socket.create_connection(('127.0.0.1', 22), 1)", "socket"),
        "UDP": refuses("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "socket"),
        "UNIX socket": refuses(
            "socket.socket(socket.AF_UNIX).connect('/run/dbus/system_bus_socket')", "socket"
        ),
        "abstract socket": refuses("socket.socket(socket.AF_UNIX).bind('\\0memlm')", "socket"),
        "pair of sockets": refuses("socket.socketpair()", "socket"),
        "netlink": refuses("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket"),
        "download": refuses("urllib.request.urlopen('http://127.0.0.1:80', timeout=1)", "urllib.request"),
        # -- other processes
        "kill the parent": refuses("os.kill(os.getppid(), 9)"),
        "kill who asks": refuses(f"os.kill({parent}, 9)"),
        "kill all": refuses("os.kill(-1, 9)"),
        "kill the group": refuses("os.killpg(0, 9)"),
        "kill the first": refuses("os.kill(1, 9)"),
        "signal by file": refuses("fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "os, fcntl"),
        "type into the terminal": refuses("fcntl.ioctl(0, termios.TIOCSTI, b'x')", "fcntl, termios"),
        "lower another's priority": refuses(f"os.setpriority(os.PRIO_PROCESS, {parent}, 19)"),
        "bind another to a core": refuses(f"os.sched_setaffinity({parent}, {{0}})"),
        "raise limits": (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
            REFUSED,
        ),
        "become root": refuses("os.setuid(0)"),
        # -- the verdict
        "exit in time": ("import os; os._exit(0)", {"failed"}),
        "sys.exit": ("import sys; sys.exit(0)", {"failed"}),
        "interrupt": ("raise KeyboardInterrupt", {"failed"}),
        "closes everything": ("import os; os.closerange(0, 100)", {"failed"}),
        "writes everywhere": (
            'import os\nfor fd in range(100):\n    for text in (b"passed\\n", b\'["passed", ""]\\n\'):\n'
            "        try: os.write(fd, text)\n        except OSError: pass\nos._exit(0)",
            {"failed"},
        ),
        "takes the token": (
            "import os, sys\nframe = sys._getframe()\n"
            "while 'token' not in frame.f_locals: frame = frame.f_back\nheld = frame.f_locals\n"
            "os.write(held['verdicts'], (held['token'] + '[\"passed\", \"\"]\\n').encode())\n"
            "os._exit(0)",
            {"forged"},
        ),
        "floods the verdict": (
            "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, bytes(65536))\n"
            "    except OSError: pass",
            {"output limit"},
        ),
        "kills itself": ("import os; os.kill(os.getpid(), 9)", {"failed"}),
        "aborts": ("import os; os.abort()", {"failed"}),
        "exits from a thread": (
            "import os, threading\nt = threading.Thread(target=lambda: os._exit(0)); t.start(); t.join()",
            {"failed"},
        ),
        "an exception without a message": (
            "class E(Exception):\n    def __str__(self): raise E\nraise E",
            {"failed"},
        ),
        # -- the interpreter
        "deep recursion": ("def f(): f()\nf()", {"failed"}),
        "deeper recursion": (
            "import sys; sys.setrecursionlimit(10**9)\ndef f(_): sorted([1], key=f)\nf(1)",
            {"failed", "memory"},
        ),
        "wrong syntax": ("def f(:", {"failed"}),
        "null bytes": ("x = 1\0", {"failed"}),
        "half a character": ("x = '\ud800'", {"failed"}),
        "asks": ("input()", {"failed"}),
        "other packages": ("import memlm", {"failed"}),
        "flood": ("while True: print('x' * 10**5)", {"output limit"}),
        "flood of errors": ("import os\nwhile True: os.write(2, bytes(10**5))", {"output limit"}),
    }
    if platform.machine() == "x86_64":
        found["system calls"] = (_SYSTEM_CALLS, {"failed"})
    return found


_SYSTEM_CALLS = """
import ctypes
numbers = dict(
    ptrace=101, process_vm_readv=310, process_vm_writev=311, mount=165, umount2=166, unshare=272,
    setns=308, bpf=321, perf_event_open=298, io_uring_setup=425, userfaultfd=323, add_key=248,
    keyctl=250, memfd_create=319, shmget=29, msgget=68, semget=64, pidfd_open=434,
    pidfd_send_signal=424, reboot=169, sethostname=170, init_module=175, pivot_root=155, chroot=161,
    setuid=105, personality=135, mknod=133, clock_settime=227, swapon=167, fork=57, vfork=58, clone=56,
    clone3=435, execve=59, execveat=322, socket=41, connect=42, sendmsg=46, tkill=200,
    rt_sigqueueinfo=129, prctl=157, seccomp=317, landlock_restrict_self=446, open_by_handle_at=304,
    inotify_init=253, fanotify_init=300, kexec_load=246, acct=163, syslog=103, iopl=172,
    memfd_secret=447, unknown=480, x32_write=0x40000001)
libc = ctypes.CDLL(None, use_errno=True)
reached = []
for name, number in numbers.items():
    ctypes.set_errno(0)
    result = libc.syscall(number, *[ctypes.c_long(0)] * 6)
    if result != -1 or ctypes.get_errno() not in (1, 38):
        reached.append((name, result, ctypes.get_errno()))
raise SystemExit(f"REACHED {reached}" if reached else "refused")
"""


def run_all(sandbox, outside: str, parent: int, workers: int = 2) -> dict[str, tuple[str, str]]:
    """Verdict and detail of each program; programs that only time can end run at once."""
    sources = [source for source, _ in programs(outside, parent).values()]
    with ThreadPoolExecutor(workers) as threads:
        results = list(threads.map(lambda source: sandbox.check(source, "pass"), sources))
    names = programs(outside, parent)
    return {name: (result.verdict, result.detail) for name, result in zip(names, results, strict=True)}


if __name__ == "__main__":
    from memlm.errors import UserError
    from memlm.evaluation.sandbox.execution import Sandbox

    layers, outside, parent = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3])
    try:
        made = Sandbox(seconds=1, layers=layers)
        content = {"layers": made.layers, "results": run_all(made, outside, parent)}
    except UserError as error:
        content = {"error": str(error)}
    print(json.dumps(content))
