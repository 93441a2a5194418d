"""Prints an ELF file's size of .text, and its largest stack frames from .stack_sizes (rustc -Z emit-stack-sizes)."""
import re
import struct
import sys

data = open(sys.argv[1], "rb").read()
wide = data[4] == 2  # ELF64
word = "Q" if wide else "I"
offset, = struct.unpack_from("<" + word, data, 40 if wide else 32)
size, count, names = struct.unpack_from("<HHH", data, 58 if wide else 46)
# name, type, flags, address, offset, size, link, info, alignment, entry size
headers = [struct.unpack_from("<II" + 4 * word + "II" + 2 * word, data, offset + i * size) for i in range(count)]


def section(header):
    return data[header[4]:header[4] + header[5]]


def name(strings, at):
    return strings[at:strings.index(b"\0", at)].decode()


sections = {name(section(headers[names]), header[0]): header for header in headers}
symbols, strings = section(sections[".symtab"]), section(sections[".strtab"])
functions = {}
for at in range(0, len(symbols), 24 if wide else 16):
    if wide:
        string, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", symbols, at)
    else:
        string, value, _, info = struct.unpack_from("<IIIB", symbols, at)
    if info & 15 == 2:
        functions[value & (~0 if wide else ~1)] = name(strings, string)  # a Thumb function's lowest bit is set

frames, at = [], 0
stack_sizes = section(sections[".stack_sizes"])
while at < len(stack_sizes):
    address, = struct.unpack_from("<" + word, stack_sizes, at)
    at += 8 if wide else 4
    frame = shift = 0
    while True:
        byte = stack_sizes[at]
        at += 1
        frame |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    frames.append((frame, functions.get(address & (~0 if wide else ~1), hex(address))))
frames.sort(reverse=True)


def readable(symbol):
    """The parts of a mangled name."""
    return "::".join(re.findall(r"\d+([a-z_][a-z_0-9]*)", symbol)[-5:]) or symbol


text = sum(header[5] for name, header in sections.items() if name.startswith(".text"))
print(f".text {text / 1024:7.1f} KiB; frames:", ", ".join(f"{size} {readable(f)}" for size, f in frames[:3]))
