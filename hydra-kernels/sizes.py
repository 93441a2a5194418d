"""Prints a row of the README's table from three ELF files, linked for a forward pass, for both passes, and for both in bf16:
the size of .text, and the largest stack frame from .stack_sizes (rustc -Z emit-stack-sizes).

python3 sizes.py ROW FORWARD STEP STEP_BF16, where ROW is how the row begins. Fails if a figure in the README's row is more
than a tenth off.
"""
import re
import struct
import sys
from pathlib import Path


def sections_of(data):
    """An ELF file's sections by name, whether it is of 64 bits, and the code of its addresses for `struct`."""
    wide = data[4] == 2  # ELF64
    word = "Q" if wide else "I"
    offset, = struct.unpack_from("<" + word, data, 40 if wide else 32)
    size, count, names = struct.unpack_from("<HHH", data, 58 if wide else 46)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    headers = [struct.unpack_from("<II" + 4 * word + "II" + 2 * word, data, offset + i * size) for i in range(count)]
    contents = [data[header[4]:header[4] + header[5]] for header in headers]
    return {name(contents[names], header[0]): content for header, content in zip(headers, contents)}, wide, word


def name(strings, at):
    return strings[at:strings.index(b"\0", at)].decode()


def functions_of(sections, wide):
    """Names of functions by address. A Thumb function's lowest bit is set in the symbol, and cleared here."""
    symbols, strings, functions = sections[".symtab"], sections[".strtab"], {}
    for at in range(0, len(symbols), 24 if wide else 16):
        if wide:
            string, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", symbols, at)
        else:
            string, value, _, info = struct.unpack_from("<IIIB", symbols, at)
        if info & 15 == 2:
            functions[value & ~1] = name(strings, string)
    return functions


def measure(path):
    """KiB of .text, and the frames: (bytes, function), the largest first."""
    sections, wide, word = sections_of(Path(path).read_bytes())
    functions = functions_of(sections, wide)
    frames, at, sizes = [], 0, sections[".stack_sizes"]
    while at < len(sizes):
        address, = struct.unpack_from("<" + word, sizes, at)
        at += 8 if wide else 4
        frame = shift = 0
        while True:
            byte = sizes[at]
            at += 1
            frame |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        frames.append((frame, functions.get(address & ~1, hex(address))))
    text = sum(len(content) for section, content in sections.items() if section.startswith(".text"))
    return text / 1024, sorted(frames, reverse=True)


def readable(symbol):
    """The parts of a mangled name."""
    return "::".join(re.findall(r"\d+([a-z_][a-z_0-9]*)", symbol)[-5:]) or symbol


row, *paths = sys.argv[1:]
texts, frames = zip(*map(measure, paths))
measured = [*texts, frames[1][0][0] / 1024, frames[2][0][0] / 1024]
print(row, " | ".join(f"{figure:.0f} KiB" for figure in measured), "|")
for frame, symbol in frames[2][:3]:
    print(f"    a frame of {frame} bytes: {readable(symbol)}")
readme = Path(__file__).with_name("README.md").read_text()
line = next((line for line in readme.splitlines() if line.startswith(row)), "")
stated = [int(figure) for figure in re.findall(r"(\d+) KiB", line)]
if len(stated) != len(measured) or any(abs(a - b) > b / 10 for a, b in zip(stated, measured)):
    sys.exit(f"hydra-kernels/README.md has other sizes: {line or 'no such row'}")
