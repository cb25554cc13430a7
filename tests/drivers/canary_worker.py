"""What a worker does that leaves its canary wherever it can. Run as `python -c`, in a container or not.

The environment has the canary in two halves, so that only what the worker itself wrote holds it whole. In a
container it is a slot's uid from the beginning; as a process it is the service, and its child becomes one.
"""

PLANT = '''
import ctypes, os, resource, signal, sys, tempfile, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mq_open.restype = ctypes.c_int
canary = os.environ["HALF_A"] + os.environ["HALF_B"]
share = os.path.dirname(os.environ["GPU_WORKER_SOCKET"])
missing = []

def leave(place, do):
    try:
        do()
    except Exception as error:
        missing.append(f"{place}: {error!r}")

def write(path):
    with open(path, "w") as file:
        file.write(canary)

def checked(number):
    if number == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return number

def shared_memory():
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(checked(libc.shmget(0, 4096, 0o1600)), None, 0)
    ctypes.memmove(at, canary.encode(), len(canary))
    libc.shmdt(ctypes.c_void_p(at))

def semaphores():
    checked(libc.semget(int(canary[:7], 16), 1, 0o1600))

def messages():
    queue = checked(libc.msgget(0, 0o1600))
    message = ctypes.create_string_buffer((1).to_bytes(8, sys.byteorder) + canary.encode())
    checked(libc.msgsnd(queue, message, len(canary), 0))

def message_queue():
    checked(libc.mq_open(("/" + canary).encode(), os.O_CREAT | os.O_RDWR, 0o600, None))

def nested(folder):
    inner = f"{folder}/{canary}"
    os.makedirs(f"{inner}/a/b")
    write(f"{inner}/a/b/file")
    os.symlink("/etc/" + canary, f"{inner}/link")
    os.mkfifo(f"{inner}/pipe")
    os.chmod(f"{inner}/a", 0)
    os.chmod(inner, 0)

def forget_environment():
    start, end = (int(field) for field in open("/proc/self/stat").read().rpartition(")")[2].split()[47:49])
    ctypes.memset(start, 0, end - start)

def stay(prepare=lambda: None):
    """A process that has left its session, and says when it is there."""
    here, there = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            prepare()
            os.write(there, b"x")
            while True:
                signal.pause()
        os._exit(0)
    os.close(there)
    os.wait()
    os.read(here, 1)

def crash(folder, uid=None):
    """A core file of a process that has the canary in its memory."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        if uid is not None:
            os.setgid(uid); os.setuid(uid)
        libc.prctl(4, 1, 0, 0, 0)
        os.abort()
    if not os.WCOREDUMP(os.waitpid(pid, 0)[1]):
        raise OSError("no core was written")

def as_uid():
    leave("sysv shared memory", shared_memory)
    leave("sysv semaphores", semaphores)
    leave("sysv messages", messages)
    leave("message queue", message_queue)
    leave("/dev/shm", lambda: write(f"/dev/shm/{canary}"))
    leave("/tmp", lambda: nested("/tmp"))
'''

IN_A_CONTAINER = (
    PLANT
    + """
as_uid()
leave("/data", lambda: write("/data/canary"))
leave("/var/tmp", lambda: write("/var/tmp/canary"))
leave("share", lambda: write(f"{share}/canary"))
leave("core", lambda: crash(share))
stay()
print(canary, flush=True)
print("missing", missing, flush=True)
print("up", flush=True)
while True:
    signal.pause()
"""
)

AS_A_PROCESS = (
    PLANT
    + """
uid = int(os.environ["CANARY_UID"])
leave("share", lambda: write(f"{share}/canary"))
leave("TMPDIR", lambda: write(tempfile.mkstemp()[1]))
leave("core", lambda: crash(os.environ["CANARY_CORES"], uid))
stay()
print("missing", missing, flush=True)
missing.clear()
pid = os.fork()
if pid == 0:
    forget_environment()
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
    os.environ["HOME"] = "/tmp"
    as_uid()
    stay()
    print("missing", missing, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(canary, flush=True)
print("up", flush=True)
while True:
    signal.pause()
"""
)

CRASHES = (
    PLANT
    + """
crash(os.environ["CANARY_CORES"], int(os.environ["CANARY_UID"]))
"""
)
"""Something else that runs as the uid, whose core files nobody has forbidden."""
