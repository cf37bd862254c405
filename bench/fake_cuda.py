"""A CUDA device that is not there: what would a GPU wait for, and how much memory would it need?

    python bench/fake_cuda.py                     two steps of training, validation, prediction, ...
    python bench/fake_cuda.py --plant             the same with faults planted: they must be found

Tensors of FakeTensorMode have a shape, a type and a device, and nothing in them. So the scripts of
this project run on "cuda" without a GPU. Nothing is computed: the modes below watch which
operations are asked for. `Waits` finds what mixes devices or makes the CPU wait for the GPU, and
`Meter` adds up memory and traffic (bench/simulate.py).

Some parts of torch ask whether CUDA was built, and a CPU build says no. `install` changes its mind,
in the memory of the process. That needs a process of its own, and the very version of torch that
requirements.txt pins.
"""

import argparse
import contextlib
import ctypes
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import ROOT, random_documents, random_tree, stages
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from plumbing import label_level
from plumbing.label_level import product

ALIVE = []  # what C++ points to must not be collected
POINTER = ctypes.c_void_p


# 1. A CPU build of torch that believes in CUDA.


def library(name: str) -> ctypes.CDLL:
    """A library of torch."""
    folder = Path(torch.__file__).parent / "lib"
    (path,) = [path for path in folder.glob(f"{name}.*") if path.suffix in (".so", ".dylib")]
    return ctypes.CDLL(str(path))


def function_that_says(value: int) -> int:
    """The address of a C function without arguments that returns a number."""
    function = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: value)
    ALIVE.append(function)
    return ctypes.cast(function, POINTER).value


def pinned_torch() -> str:
    """The version of torch in requirements.txt."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("torch=="):
            return line.removeprefix("torch==").strip()
    raise SystemExit("requirements.txt pins no version of torch")


def install() -> None:
    """After this, autograd and the optimisers take tensors on "cuda" for what they are.

    It writes into torch's own tables, whose places differ between versions: SystemExit unless torch
    is a CPU build of the version in requirements.txt.
    """
    if torch.__version__ != f"{pinned_torch()}+cpu":
        raise SystemExit(
            f"torch {torch.__version__}: a CUDA device can be pretended only with the CPU build of "
            f"torch {pinned_torch()}, the version in requirements.txt"
        )
    # 1. Autograd wants a guard for the current device. torch has one that does nothing, and puts it
    #    where there is a guard that counts no devices. So we put one there: an object all of whose
    #    methods say 0.
    registry_of_guards = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (POINTER * 8).in_dll(library("libc10"), registry_of_guards)
    cuda = 1  # number of the device type
    if not guards[cuda]:
        methods = (POINTER * 64)(*[function_that_says(0)] * 64)
        guard = POINTER(ctypes.addressof(methods))
        ALIVE.extend([methods, guard])
        guards[cuda] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()
    # 2. The hooks for CUDA say that it is not built. Give them a table of methods that says it is.
    get_hooks = library("libtorch_cpu")["_ZN2at6detail12getCUDAHooksEv"]
    get_hooks.restype = POINTER
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(POINTER))
    before_table = 2 * ctypes.sizeof(POINTER)  # type information stands in front of a table
    table = (POINTER * 64).from_buffer_copy(ctypes.string_at(hooks[0] - before_table, 8 * 64))
    is_built, is_available, has_context = 2, 3, 4  # places among the methods
    for place in (is_built, is_available, has_context):
        table[2 + place] = function_that_says(1)
    ALIVE.append(table)
    hooks[0] = ctypes.addressof(table) + before_table
    assert str(torch._C._accelerator_getAccelerator()) == "cuda"
    # 3. Optimisers that work on many tensors at once ask for their exact type.
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    sys.modules["torch.optim.optimizer"]._foreach_supported_types.append(FakeTensor)


# 2. What the Python side of torch says of CUDA.


class Event:
    """A torch.cuda.Event of a device that is always done."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def record(self, *args) -> None:
        pass

    def synchronize(self) -> None:
        pass


real_numpy = torch.Tensor.numpy
real_attention = functional.scaled_dot_product_attention


def numpy(tensor: Tensor, *, force: bool = False) -> np.ndarray:
    """An array of that shape, of ones. TypeError as in torch if the tensor is on the device."""
    if not isinstance(tensor, FakeTensor):
        return real_numpy(tensor, force=force)
    if tensor.device.type != "cpu":
        raise TypeError("can't convert a cuda tensor to numpy; use Tensor.cpu() first")
    return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def pin_memory(tensor: Tensor, *args) -> Tensor:
    """The same tensor, and a note that it is pinned."""
    tensor.is_in_pinned_memory = True
    return tensor


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more
):
    """Memory-efficient attention: what a GPU takes where there is a mask.

    The choice is made in C++, which knows that there is no GPU.
    """
    if not query.is_cuda:
        return real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
        # The kernel wants rows that are a multiple of 16 apart.
        documents, heads, tokens, _ = query.shape
        padding = -tokens % 16
        bias = functional.pad(bias, (0, padding))[..., :tokens]
        bias = bias.expand(documents, heads, tokens, tokens)
    learns = torch.is_grad_enabled() and query.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, learns, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within, there is a CUDA device, and new tensors have nothing in them; after `install`."""
    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *args: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "is_current_stream_capturing": lambda: False,
        "Event": Event,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", numpy))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        stack.enter_context(
            mock.patch.object(functional, "scaled_dot_product_attention", attention)
        )
        # A CPU build has no randomness for CUDA. None stands for the default.
        no_noise = mock.patch.object(label_level, "noise_of_step", lambda weight, step: None)
        stack.enter_context(no_noise)
        no_context = property(lambda self: True)  # for a device that is not there
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", no_context))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def fake_cascade(
    n_labels: int,
    levels: list[int],
    topk: list[int],
    depth: int = 12,
    width: int = 768,
    max_len: int = 128,
    label_bf16: bool = False,
):
    """A cascade around a BERT of that shape, on the fake device. Call it within fake_cuda()."""
    import transformers

    tree = random_tree(n_labels, levels)
    shape = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    # On "meta" nothing is computed either. What numpy made is on the CPU, and real.
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        encoder = stages.model.Encoder(transformers.BertModel(shape), "first", max_len)
        layers = stages.model.choose_layers(depth, len(levels) + 1)
        model = stages.model.Cascade(encoder, tree, topk, layers)
        if label_bf16:
            label_head = model.heads[-1]
            label_head.weight = torch.nn.Parameter(label_head.weight.data.bfloat16())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return model.to_empty(device="cuda")


# 3. What makes a GPU wait.

# Operations whose result has a size that only the numbers tell: the CPU waits for them.
UNKNOWN_SIZE = ("_unique2", "unique_dim", "nonzero", "masked_select", "bincount", "equal")


class Waits(TorchDispatchMode):
    """Counts what mixes devices, or makes the CPU wait for the GPU: {"what at file:line": times}.

    Numbers that would come from the GPU are made up, so that the program goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """Remember what was found, and the line of this project that asked for it."""
        ours = ""
        for frame in traceback.extract_stack():
            if frame.filename.startswith(str(ROOT)) and frame.filename != __file__:
                ours = f"{Path(frame.filename).name}:{frame.name}"
        self.found[f"{what} at {ours}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        first = tensors[0] if tensors else None
        on = {tensor.device.type for tensor in tensors}
        if name == "_to_copy" and kwargs.get("device") is not None:
            self.look_at_copy(first, torch.device(kwargs["device"]).type, kwargs)
        elif name == "copy_" and len(on) > 1:
            self.look_at_copy(tensors[1], first.device.type, {"non_blocking": (*args, 0)[2]})
        elif len(on) > 1 and name != "lift_fresh":
            # A number from the CPU may stand beside tensors of the GPU, but not among indices.
            numbers = all(tensor.dim() == 0 for tensor in tensors if tensor.device.type == "cpu")
            if not numbers or "index" in name:
                self.note(f"{name} with a tensor of the CPU")
        if name == "_local_scalar_dense" and isinstance(first, FakeTensor):
            if first.is_cuda:
                self.note("a number is asked for")
            return 1.0 if first.dtype.is_floating_point else 1
        if first is None or not first.is_cuda:
            return func(*args, **kwargs)
        by_bool = name.startswith("index") and any(
            leaf.dtype == torch.bool for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)
        )
        if name in UNKNOWN_SIZE or by_bool:
            self.note(name)
            return self.made_up(name, first, args, kwargs)
        return func(*args, **kwargs)

    def look_at_copy(self, source: Tensor, target: str, kwargs: dict) -> None:
        """A copy may go on its way without waiting, from pinned memory."""
        if source.device.type == target or "cuda" not in (source.device.type, target):
            return
        if not kwargs.get("non_blocking"):
            self.note(f"a blocking copy to {target}")
        elif target == "cuda" and not getattr(source, "is_in_pinned_memory", False):
            self.note("a copy from memory that is not pinned")

    def made_up(self, name: str, first: Tensor, args: tuple, kwargs: dict) -> object:
        """What such an operation might give: as much as there can be."""
        if name == "equal":
            return True
        if name == "bincount":
            size = kwargs.get("minlength", args[2] if len(args) > 2 else 1)
            return first.new_empty(size, dtype=torch.long)
        if name == "_unique2":
            places = first.new_empty(first.shape, dtype=torch.long)
            return first.new_empty(first.numel()), places, first.new_empty(0)
        if name == "nonzero":
            return first.new_empty(first.numel(), first.dim(), dtype=torch.long)
        return first.new_empty(len(first), *first.shape[1:])


# 4. Memory and traffic.

# Operations that only look at memory, or reserve it.
LOOKS = """
    view _unsafe_view t transpose permute expand slice select split split_with_sizes unsqueeze
    squeeze detach detach_ alias as_strided unbind _reshape_alias lift_fresh chunk empty empty_like
    new_empty narrow unflatten unsafe_split empty_strided new_empty_strided
"""
VIEWS = LOOKS.split()
PICK = ("index_select", "gather", "embedding", "index")  # they read no more than they write
PUT = ("index_copy", "scatter", "scatter_add", "index_add", "index_put", "_index_put_impl")
FILL = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")  # they do not read the target
KERNELS = {"sort": 12, "argsort": 12, "topk": 8, "_unique2": 20}  # about; others have one


class Cost:
    """What operations of one kind, or of one part of a step, ask of a GPU."""

    def __init__(self) -> None:
        self.bytes = 0
        self.flops = 0
        self.launches = 0
        self.seconds = 0.0


class Meter(TorchDispatchMode):
    """Live and peak memory of the fake device; bytes, FLOPs and launches per part of a step.

    A roofline gives each operation the longest of three times: to move its bytes, to compute, to
    launch it.
    """

    def __init__(self, card: dict[str, float]) -> None:
        super().__init__()
        self.card = card  # bytes_per_s, flops16, flops32: per second; launch: seconds
        self.part = "other"
        self.costs: dict[str, Cost] = {}
        self.live = 0
        self.peak = 0
        self.sizes: dict[int, int] = {}

    def reset(self) -> None:
        self.costs = {}
        self.peak = self.live

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What runs within counts as this part of the step."""
        before = self.part
        self.part = part
        yield
        self.part = before

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "cuda" or key in self.sizes:
            return
        size = -(-storage.nbytes() // 512) * 512  # the allocator's blocks
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self.hold(tensor)
        is_on_device = any(tensor.device.type == "cuda" for tensor in inputs + outputs)
        if is_on_device and name not in VIEWS and func.namespace != "prim":
            self.count(func, name, args, kwargs, inputs, outputs, found)
        return found

    def count(self, func, name, args, kwargs, inputs, outputs, found) -> None:
        """Add an operation's cost to the part that runs."""
        changed = []
        for argument, said in zip(args, func._schema.arguments, strict=False):
            if said.alias_info is not None and said.alias_info.is_write:
                changed.extend(leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
        read = sum(size_of(tensor) for tensor in inputs)
        written = sum(size_of(tensor) for tensor in changed or outputs)
        plain = name.rstrip("_")
        if plain in PICK:
            read = written + sum(size_of(tensor) for tensor in inputs[1:])
        elif plain in PUT:
            read = sum(size_of(tensor) for tensor in inputs[1:])
            written = size_of(inputs[-1])
            if not changed:  # the target is copied first
                read += size_of(inputs[0])
                written += size_of(inputs[0])
        elif name in FILL:
            read -= written
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=found)
        launches = KERNELS.get(plain, 1)
        if name.startswith(("_foreach", "_fused")):
            launches = max(1, len(args[0]) // 30)  # some thirty tensors in a launch
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs)
        rate = self.card["flops16"] if half else self.card["flops32"]

        cost = self.costs.setdefault(self.part, Cost())
        cost.bytes += read + written
        cost.flops += flops
        cost.launches += launches
        cost.seconds += max(
            (read + written) / self.card["bytes_per_s"],
            flops / rate,
            launches * self.card["launch"],
        )


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor; a dimension that is only said to be there counts once."""
    size = tensor.element_size()
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or n == 0:
            size *= n
    return size


# 5. Everything that runs on a GPU, at toy size.


def what_waits(amp: str, accumulate: int, label_bf16: bool) -> dict[str, Counter[str]]:
    """{part: what Waits found} of training, validation, prediction and exact scoring."""
    n_labels = 4096
    splits = {}
    for seed, name in enumerate(("train", "val", "test")):
        n_documents = 16 * accumulate if name == "train" else 16
        splits[name] = random_documents(n_documents, n_labels, 1000, 30, seed)
    meta = {"encoder": "bert", "vocab_size": 1000, "prefix": [2], "suffix": [3], "pad": 0}
    data = stages.data.Data(splits, [""] * n_labels, meta)
    config = stages.train.Config(
        epochs=1, batch_size=8, accumulate=accumulate, lr=1e-3, lr_encoder=1e-4, amp=amp, max_len=64
    )
    found = {}
    with fake_cuda():
        model = fake_cascade(n_labels, [16, 64, 512], [8, 8, 8], 4, 64, 64, label_bf16)
        device = torch.device("cuda")
        few = np.arange(4)
        example = data.batch("test", few, 64).to(device)
        model.amp = stages.train.choose_amp(amp, model, example)
        batches = stages.train.Batches(data, 8, 64, 0)
        records = []
        parts: dict[str, Callable] = {
            "train": lambda: stages.train.fit(model, batches, config, records.append),
            "validate": lambda: stages.train.validate(model, data, config),
            "predict": lambda: model.eval().predict(example, 5, "path"),
            "exact": lambda: stages.eval.predict_exact(model.eval(), example, 5, "path", 100),
        }
        for part, run in parts.items():
            with Waits() as watch:
                run()
            found[part] = watch.found
    return found


# 6. The command.

# What may wait, and why.
ALLOWED = {
    "a number is asked for at 04_train.py:record": "the progress line, some 50 times in a run",
    "a blocking copy to cpu at 04_train.py:predict_rankings": "the predictions of a batch",
}


def with_unique(x_BD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight.flatten()[:9].unique()
    return product(x_BD, weight, bias)


def with_arange(x_BD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    everything = torch.arange(len(weight))
    return product(x_BD, weight[everything], bias)


def with_item(x_BD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if float(x_BD.sum()) > 1e9:
        raise RuntimeError("features are too large")
    return product(x_BD, weight, bias)


# Ways to compute the logits with a fault in them: to see that it is found.
PLANTED = {"unique": with_unique, "arange": with_arange, "item": with_item}
# Precision, batches per step, label rows in bf16.
WAYS = {
    "bf16": ("bf16", 1, False),
    "fp16": ("fp16", 1, False),
    "two batches a step": ("bf16", 2, False),
    "bf16 rows": ("bf16", 1, True),
}


def report(name: str, way: tuple) -> int:
    """Print what waits; the number of faults."""
    faults = 0
    for part, found in what_waits(*way).items():
        print(f"{name}, {part}:")
        for what, times in found.items():
            is_allowed = what in ALLOWED
            faults += not is_allowed
            print(f"    {times:3} x {what}: {ALLOWED[what] if is_allowed else 'A FAULT'}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plant", action="store_true", help="put faults in, one after the other")
    args = parser.parse_args()
    install()
    if args.plant:
        for fault, way_to_compute in PLANTED.items():
            with mock.patch.object(label_level, "product", way_to_compute):
                if not report(f"planted {fault}", WAYS["bf16"]):
                    sys.exit(f"the planted fault '{fault}' was not found")
        return
    faults = sum(report(name, way) for name, way in WAYS.items())
    print(f"{faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
