"""A block that runs and notes which of its ordering instructions order something.

An instruction whose removal changes nothing orders nothing. The rule of each kind says so from what happened before and
behind it: which bytes and words were used, by whom. It does not ask whether the emulator's checks complain.

- bar.sync: what a thread wrote between the barrier before and this one, another uses until the next one; or the other
  way round.
- fence.proxy.async: bytes written since the fence before are a matrix instruction's until the next fence.
- wgmma.fence: a register used since the fence before is a wgmma's until the next fence.
- cp.async and wgmma groups: without it, a copy or a product would not have been waited for when its bytes or its
  registers are used, or when the block ends.
- tcgen05.wait::st: words that were stored since the wait before are used until the next wait.
- tcgen05.wait::ld: words that were loaded since the wait before are written until the next wait.
- mbarrier.try_wait: what a product in flight uses is used until the next wait, or the block ends before that.
- tcgen05.commit, mbarrier.init: always.

Barriers also order global memory; the kernels that are watched do not pass anything from thread to thread there.
"""

from __future__ import annotations

import numpy as np

from tests.emulator.machine import Block, Step, Value
from tests.emulator.memory import GlobalMemory
from tests.emulator.ptx import Instruction
from tests.emulator.shared_memory import CHUNK, NOBODY, SEVERAL, WRITTEN, SharedMemory
from tests.emulator.tensor_memory import PRODUCT, STORING, TensorMemory

# By how its opcode begins. Each kind is a row of the report.
ORDERING = (
    *("bar.sync", "barrier.sync", "fence.proxy.async", "cp.async.commit_group", "cp.async.wait_group"),
    *("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"),
    *("tcgen05.wait::st", "tcgen05.wait::ld", "tcgen05.commit", "mbarrier.init", "mbarrier.try_wait"),
)


def kind_of(instruction: Instruction) -> str | None:
    """Which kind of ordering instruction this is, if any."""
    return next((kind for kind in ORDERING if instruction.opcode.startswith(kind)), None)


def again(block: Block) -> Block:
    """The same block at its beginning."""
    memory = block.global_memory
    fresh = GlobalMemory([], memory.ahead)
    fresh.early, fresh.starts, fresh.pieces, fresh.ends = memory.early, memory.starts, memory.pieces, memory.ends
    return Block(block.kernel, block.index, block.grid, block.arguments, fresh, SharedMemory(block.shared.size))


class Users:
    """Of each byte or word, which thread or warp wrote and read it since the last barrier, and before that one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.now = [np.full(shape, NOBODY, np.int16) for _ in range(2)]
        self.before = [np.full(shape, NOBODY, np.int16) for _ in range(2)]

    def barrier(self) -> None:
        """What was now is before."""
        self.before, self.now = self.now, [np.full_like(users, NOBODY) for users in self.now]

    def note(self, at, users: np.ndarray, *, write: bool) -> bool:
        """Note a use. Returns whether others used the same before, in a way that does not go with it."""
        now = self.now[0 if write else 1]
        for user in np.unique(users):
            mine = tuple(part[users == user] for part in at) if isinstance(at, tuple) else at[users == user]
            now[mine] = np.where((now[mine] == NOBODY) | (now[mine] == user), user, SEVERAL)
        return self.conflicts(at, users, write=write)

    def conflicts(self, at, users: np.ndarray, *, write: bool) -> bool:
        """Whether others than these users used the same before, in a way that does not go with it."""
        kinds = self.before if write else self.before[:1]
        return any(((kind[at] != NOBODY) & ((kind[at] != users) | (users == SEVERAL))).any() for kind in kinds)


class Groups:
    """Groups of copies or of products in flight: as they are, and as they were without each commit or wait."""

    def __init__(self, sites: list[int]) -> None:
        self.groups: dict[int | None, list[list[int]]] = {site: [[]] for site in (None, *sites)}
        # What would still be in flight without a site, though it is not.
        self.late: dict[int, set[int]] = {}

    def start(self, item: int) -> None:
        for groups in self.groups.values():
            groups[-1].append(item)

    def commit(self, at: int) -> None:
        for site, groups in self.groups.items():
            if site != at:
                groups.append([])

    def wait(self, at: int, pending: int) -> None:
        for site, groups in self.groups.items():
            if site != at:
                del groups[: -1 - pending]
        left = {site: {item for group in groups for item in group} for site, groups in self.groups.items()}
        true = left.pop(None)
        self.late = {site: items - true for site, items in left.items() if items - true}

    def missed_by(self, items: set[int]) -> set[int]:
        """Without which sites one of these would still be in flight."""
        return {site for site, late in self.late.items() if late & items}


class Watch:
    """Watches one run. ran: the ordering instructions that it came to; useful: those that order something."""

    def __init__(self, block: Block, code: list[Step], ends: frozenset[int]) -> None:
        self.block = again(block)
        self.ran: set[int] = set()
        self.useful: set[int] = set()
        # The last one of each kind, and what was written, used, stored or loaded ahead of it.
        self.fence, self.unfenced = -1, np.zeros(len(self.block.shared.bytes), bool)
        self.register_fence, self.touched = -1, set()
        nothing = np.zeros(TensorMemory.SHAPE, bool)
        self.load_wait, self.loaded = -1, nothing
        self.store_wait, self.stored = -1, nothing
        self.product_wait, self.products_words = -1, nothing
        self.products_chunks = np.zeros(len(self.block.shared.operands), bool)
        instructions = block.kernel.instructions
        self.copies = Groups([at for at, i in enumerate(instructions) if i.opcode.startswith("cp.async.")])
        self.products = Groups([at for at, i in enumerate(instructions) if i.opcode.startswith("wgmma.")])
        # The last copy to each byte, the last product of each 16 bytes, and those of each register.
        self.copy_to = np.full(len(self.block.shared.bytes), -1)
        self.product_of = np.full(len(self.block.shared.operands), -1)
        self.products_of: dict[str, set[int]] = {}
        self.num_started = 0
        self.barriers: set[int] = set()
        self.waiting: set[int] = set()
        self._shared()
        if any(i.opcode.startswith("tcgen05") for i in block.kernel.instructions):
            self._tensor()
        self.block.run([self._watched(i, at, code[at]) for at, i in enumerate(instructions)], ends)
        self.useful |= {site for site, late in self.products.late.items() if late}
        if self.products_words.any():
            self.useful.add(self.product_wait)

    def _watched(self, instruction: Instruction, at: int, run: Step) -> Step:
        kind = kind_of(instruction)
        if kind is None and not instruction.opcode.startswith("wgmma.mma_async"):
            return run

        def watched(block: Block, active: Value) -> None:
            if kind is None:
                used = {name.strip() for text in instruction.operands[:2] for name in text.strip("{} ").split(",")}
                if self.touched is None or self.touched & used:
                    self.useful.add(self.register_fence)
                self.num_started += 1
                self.products.start(self.num_started)
                for name in used:
                    self.products_of.setdefault(name, set()).add(self.num_started)
            else:
                self.ran.add(at)
            # Copies write their bytes while they are waited for, when they are not late yet.
            if kind == "cp.async.wait_group":
                run(block, active)
                self._note(kind, at, instruction)
                return
            if kind is not None:
                self._note(kind, at, instruction)
            run(block, active)

        return watched

    def _note(self, kind: str, at: int, instruction: Instruction) -> None:
        block, useful = self.block, False
        if kind in ("bar.sync", "barrier.sync"):
            self.waiting.add(at)
        elif kind == "fence.proxy.async":
            self.fence, self.unfenced = at, block.shared.state == WRITTEN
        elif kind == "wgmma.fence":
            self.register_fence, self.touched = at, None if block.touched is None else {*block.touched}
        elif kind in ("cp.async.commit_group", "wgmma.commit_group"):
            (self.copies if kind.startswith("cp") else self.products).commit(at)
        elif kind in ("cp.async.wait_group", "wgmma.wait_group"):
            (self.copies if kind.startswith("cp") else self.products).wait(at, int(instruction.operands[0]))
        elif kind == "tcgen05.wait::st":
            self.store_wait, self.stored = at, block.tensor_memory.state == STORING
        elif kind == "tcgen05.wait::ld":
            self.load_wait, self.loaded = at, block.tensor_memory.loading.copy()
        elif kind == "mbarrier.try_wait":
            memory = block.tensor_memory
            self.product_wait, self.products_words = at, (memory.state == PRODUCT) | (memory.weights > 0)
            self.products_chunks = block.shared.operands > 0
        else:
            useful = True
        if useful:
            self.useful.add(at)

    def _wrap(self, memory, name: str, before) -> None:
        method = getattr(memory, name)

        def wrapped(*args, **options):
            before(*args, **options)
            return method(*args, **options)

        setattr(memory, name, wrapped)

    def _shared(self) -> None:
        shared = self.block.shared
        users = Users(shared.bytes.shape)

        def note(words, size, threads, write):
            at = (words.astype(np.int64) * size)[:, None] + np.arange(size)
            self.useful |= self.copies.missed_by({*np.unique(self.copy_to[at]).tolist()})
            if write and self.products_chunks[at // CHUNK].any():
                self.useful.add(self.product_wait)
            if write:
                self.useful |= self.products.missed_by({*np.unique(self.product_of[at // CHUNK]).tolist()})
            if users.note(at, np.broadcast_to(threads[:, None], at.shape), write=write):
                self.useful |= self.barriers

        def barrier():
            users.barrier()
            self.barriers, self.waiting = self.waiting, set()

        def operand(chunks, thread):
            at = chunks[..., None] * CHUNK + np.arange(CHUNK)
            if users.conflicts(at, np.full(at.shape, SEVERAL if thread == NOBODY else thread), write=False):
                self.useful |= self.barriers
            if self.unfenced[at].any():
                self.useful.add(self.fence)
            self.useful |= self.copies.missed_by({*np.unique(self.copy_to[at]).tolist()})
            self.product_of[chunks] = self.num_started

        def release(chunks, *, ordered):
            if not ordered:
                at = chunks[..., None] * CHUNK + np.arange(CHUNK)
                users.note(at, np.full(at.shape, SEVERAL), write=False)

        def copy(copy):
            self.num_started += 1
            self.copies.start(self.num_started)
            self.copy_to[copy.addresses[:, None] + np.arange(copy.values.shape[1])] = self.num_started

        def touch(name, *, read):
            self.useful |= self.products.missed_by(self.products_of.get(name, set()))

        self._wrap(self.block, "start_copy", copy)
        self._wrap(self.block, "touch", touch)
        self._wrap(shared, "_read", lambda words, size, threads: note(words, size, threads, False))
        self._wrap(shared, "_check_write", lambda words, size, threads, differs: note(words, size, threads, True))
        self._wrap(shared, "barrier", barrier)
        self._wrap(shared, "read_operand", operand)
        self._wrap(shared, "release_operand", release)

    def _tensor(self) -> None:
        memory = self.block.tensor_memory
        users = Users(memory.SHAPE)

        def use(at):
            if self.stored[at].any():
                self.useful.add(self.store_wait)
            if self.products_words[at].any():
                self.useful.add(self.product_wait)

        def write(at, warps):
            use(at)
            if self.loaded[at].any():
                self.useful.add(self.load_wait)
            if users.conflicts(at, np.broadcast_to(warps, at[0].shape), write=True):
                self.useful |= self.barriers

        def store(at, values, warps):
            write(at, warps)
            users.note(at, np.broadcast_to(warps, at[0].shape), write=True)

        def load(at, warps):
            use(at)
            if users.note(at, np.broadcast_to(warps, at[0].shape), write=False):
                self.useful |= self.barriers

        def begin(product, warp, *, add):
            write(product.sums, np.array(warp))
            use(product.weights)
            if users.conflicts(product.weights, np.full(product.weights[0].shape, warp), write=False):
                self.useful |= self.barriers

        def deallocate(columns, warp):
            lanes, at = np.indices((memory.SHAPE[0], columns))
            write((lanes, at), np.array(warp))

        self._wrap(memory, "store", store)
        self._wrap(memory, "load", load)
        self._wrap(memory, "begin", begin)
        self._wrap(memory, "deallocate", deallocate)
        self._wrap(memory, "barrier", users.barrier)
