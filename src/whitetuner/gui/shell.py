"""Pages that need nothing loaded: what is shown until the forms are there, and the login."""

from __future__ import annotations

from html import escape

LANGUAGES = ("zh", "en")

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#2b5fc9"/>'
    '<path d="M6 22 L12 10 L16 19 L20 10 L26 22" fill="none" stroke="#fff" stroke-width="3"/></svg>'
)
_STYLE = """
:root{color-scheme:light dark;--ink:#1f2430;--soft:#6b7280;--back:#f6f7f9;--card:#fff;--line:#e2e5ea;--blue:#3b6fd6}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#9aa2ae;--back:#14161b;--card:#1d2027;--line:#333844;--blue:#7ea6ff}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.6 system-ui,"Microsoft YaHei","PingFang SC","Noto Sans CJK SC",sans-serif}
main{max-width:34rem;margin:14vh auto 0;padding:0 1.2rem}h1{font-size:1.5rem;margin:0 0 .3rem}p{color:var(--soft);margin:.4rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.4rem;margin-top:1.2rem}
label{display:block;margin-bottom:.3rem}input{width:100%;padding:.7rem;border:1px solid var(--line);border-radius:8px;
background:var(--back);color:var(--ink);font:inherit}
button{margin-top:.9rem;min-height:44px;padding:.5rem 1.4rem;border:0;border-radius:8px;
background:var(--blue);color:#fff;font:inherit;cursor:pointer}.bar{height:4px;border-radius:2px;background:var(--line);overflow:hidden;margin-top:1rem}
.bar i{display:block;width:30%;height:100%;background:var(--blue);animation:go 1.2s infinite ease-in-out}
@keyframes go{from{margin-left:-30%}to{margin-left:100%}}.bad{color:#c0392b}
@media(prefers-color-scheme:dark){.bad{color:#ff8f80}button{color:#10131a}}
"""

_SHELL = {
    "zh": ("轻量的图像/视频模型训练器", "正在打开界面，几秒钟就好……", "界面没能打开，原因见终端。"),
    "en": (
        "a light trainer for image and video models",
        "Opening the page, a few seconds ...",
        "The page could not be opened; the terminal says why.",
    ),
}
_LOGIN = {
    "zh": ("请输入密码", "密码", "登录", "密码不对。", "尝试次数太多，请过 {seconds} 秒再试。"),
    "en": (
        "Please log in",
        "Password",
        "Log in",
        "That is not the password.",
        "Too many attempts; try again in {seconds} seconds.",
    ),
}


def _html(language: str, body: str) -> str:
    tag = "zh-CN" if language == "zh" else "en"
    return (
        f'<!doctype html><html lang="{tag}"><head><meta charset="utf-8"><title>White Tuner</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="/favicon.ico">'
        f"<style>{_STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def waiting(language: str) -> str:
    """Shown until the forms are built: asks /api/ready and reloads when they are."""
    title, text, failed = _SHELL[language]
    script = (
        "const look=()=>fetch('/api/ready').then(r=>r.json()).then(j=>{if(j.ready)location.reload();"
        "else if(j.failed){document.getElementById('say').textContent=document.getElementById('say').dataset.failed;"
        "document.querySelector('.bar').remove()}else setTimeout(look,300)}).catch(()=>setTimeout(look,1000));look()"
    )
    return _html(
        language,
        f'<h1>White Tuner</h1><p>{title}</p><div class="card"><div id="say" data-failed="{escape(failed)}">{text}</div>'
        f'<div class="bar"><i></i></div></div><script>{script}</script>',
    )


def login(language: str, *, wrong: bool = False, wait_s: int = 0, target: str = "/") -> str:
    """The login. wrong: the last try was; wait_s: seconds until the next try is heard; target: where to go then."""
    title, label, button, bad, later = _LOGIN[language]
    note = later.format(seconds=wait_s) if wait_s else bad if wrong else ""
    return _html(
        language,
        f'<h1>White Tuner</h1><form class="card" method="post" action="/login"><p>{title}</p>'
        f'<label for="password">{label}</label><input id="password" name="password" type="password" required autofocus '
        f'autocomplete="current-password"><input type="hidden" name="target" value="{escape(target)}">'
        f'<p class="bad" role="alert">{note}</p><button>{button}</button></form>',
    )


def entered(target: str) -> str:
    """After a login: a step of our own page to the target, since a redirect that began elsewhere carries no strict cookie."""
    refresh = f'<meta http-equiv="refresh" content="0;url={escape(target)}">'
    return f'<!doctype html><meta charset="utf-8">{refresh}<title>White Tuner</title>'


def language_of(cookies: dict[str, str], accepted: str) -> str:
    """zh or en: the cookie, then the browser's first language that is one of them."""
    if cookies.get("wt_lang") in LANGUAGES:
        return cookies["wt_lang"]
    for part in accepted.lower().split(","):
        name = part.split(";")[0].strip()
        for language in LANGUAGES:
            if name == language or name.startswith(f"{language}-"):
                return language
    return "en"
