"""The page's style sheet: the report's colours and charts, in a frame for people who come often.

From 360 px on; light and dark; a visible focus everywhere; nothing moves for whom that is too much.
"""

from server.report_style import CHARTS, COLOURS

_TONES = """
:root {
  --good: #0b5d43; --good-soft: #0b5d4316; --warn: #8a4200; --warn-soft: #b84a0018;
  --bad: #a3201a; --bad-soft: #a3201a14; --shadow: 0 1px 2px #1d24200d; --side: #fbfaf7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --good: #7fd1ae; --good-soft: #7fd1ae1f; --warn: #f2ae72; --warn-soft: #f29b5522;
    --bad: #ff9f96; --bad-soft: #ff6b5e22; --shadow: none; --side: #151a17;
  }
}
"""

_FRAME = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 64px; }
body {
  margin: 0; color: var(--ink);
  background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; display: grid; grid-template-columns: 212px minmax(0, 1fr);
  min-height: 100vh;
}
a { color: var(--accent); text-decoration: underline; text-decoration-thickness: 1px;
    text-underline-offset: 3px;
    text-decoration-color: color-mix(in srgb, currentColor 40%, transparent); }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
main:focus { outline: none; }
h1, h2, h3, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
ul, ol { list-style: none; }
h1 { font-size: 1.6rem; line-height: 1.2; letter-spacing: -0.02em; font-weight: 640;
     overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; letter-spacing: -0.005em; font-weight: 620; }
h3 { font-size: 0.95rem; font-weight: 600; overflow-wrap: anywhere; }
code { font: 0.9em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
       overflow-wrap: anywhere; }
time { white-space: nowrap; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
          white-space: nowrap; margin: 0; }
.skip { position: absolute; left: 12px; top: -60px; background: var(--card); padding: 8px 14px;
        border-radius: 8px; z-index: 3; }
.skip:focus { top: 10px; }
.icon { width: 18px; height: 18px; flex: none; fill: none; stroke: currentColor;
        stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.icon.filled { fill: currentColor; stroke: none; width: 24px; height: 24px; }

.side { background: var(--side); border-right: 1px solid var(--hair); }
.rail { display: flex; flex-direction: column; gap: 22px; padding: 22px 14px 18px;
        position: sticky; top: 0; height: 100vh; }
.brand { display: flex; align-items: center; gap: 10px; color: var(--accent); padding: 0 8px;
         text-decoration: none; line-height: 1.2; }
.brand b { display: block; color: var(--ink); font-weight: 660; letter-spacing: -0.01em; }
.brand .network { color: var(--soft); font-size: 0.84rem; overflow-wrap: anywhere; }
nav ul { display: flex; flex-direction: column; gap: 2px; }
.side nav a { display: flex; align-items: center; gap: 10px; padding: 7px 10px; border-radius: 8px;
              color: var(--soft); text-decoration: none; font-weight: 520; }
.side nav a:hover { background: var(--hair); color: var(--ink); }
.side nav [aria-current] { background: var(--good-soft); color: var(--accent); font-weight: 620; }
.foot { margin-top: auto; display: grid; gap: 8px; padding: 0 10px; font-size: 0.86rem; }
.live { display: flex; align-items: center; gap: 8px; color: var(--soft); }
.dot { width: 8px; height: 8px; border-radius: 50%; background: var(--other); flex: none; }
.live[data-state="on"] .dot { background: #12936a; animation: breathe 3s ease-in-out infinite; }
.live[data-state="off"] .dot { background: var(--bad); }
@keyframes breathe { 50% { box-shadow: 0 0 0 4px var(--good-soft); } }
.quiet, button.quiet { background: none; border: 0; padding: 0; color: var(--soft); font: inherit;
                       font-size: 0.86rem; cursor: pointer; text-decoration: underline;
                       text-underline-offset: 3px; min-height: 0; }

main { padding: 28px clamp(18px, 3vw, 44px) 64px; max-width: 1320px; width: 100%; }
.top { display: flex; align-items: flex-start; justify-content: space-between; gap: 12px 20px;
       flex-wrap: wrap; }
.top > .pill { margin-top: 7px; }
.note { color: var(--soft); font-size: 0.9rem; max-width: 62em; text-wrap-style: pretty; }
.top .note { margin-top: 4px; }
section { margin-top: 30px; }
.head { display: flex; justify-content: space-between; align-items: baseline; gap: 6px 16px;
        margin-bottom: 10px; flex-wrap: wrap; }
.head + .note { margin: -6px 0 12px; }
.more { font-size: 0.9rem; white-space: nowrap; }
#figures > .head { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; }
.empty { color: var(--soft); background: var(--card); border: 1px dashed var(--faint);
         border-radius: 12px; padding: 18px 20px; overflow-wrap: anywhere; }
main > .empty { margin-top: 24px; }
"""

_PARTS = """
.pill { display: inline-flex; align-items: center; gap: 6px; border-radius: 99px; font-weight: 580;
        padding: 1px 10px 1px 8px; font-size: 0.82rem; white-space: nowrap; color: var(--soft);
        background: var(--hair); line-height: 1.6; }
.pill::before { content: ""; width: 7px; height: 7px; border-radius: 50%;
                background: currentColor; }
.pill.good { color: var(--good); background: var(--good-soft); }
.pill.warn { color: var(--warn); background: var(--warn-soft); }
.pill.bad { color: var(--bad); background: var(--bad-soft); }
.alerts { display: grid; gap: 8px; margin-top: 20px; }
.alerts li { display: grid; grid-template-columns: minmax(12rem, 19rem) minmax(0, 1fr) auto;
             gap: 2px 16px; padding: 11px 16px; border-radius: 10px;
             border: 1px solid var(--hair); border-left: 4px solid; background: var(--card);
             overflow-wrap: anywhere; }
.alerts span, .alerts time { color: var(--soft); }
.alerts .bad { border-left-color: var(--bad); } .alerts .bad b { color: var(--bad); }
.alerts .warn { border-left-color: var(--warn); } .alerts .warn b { color: var(--warn); }
.alerts .good { border-left-color: var(--good); } .alerts .good b { color: var(--good); }

.now { display: grid; grid-template-columns: minmax(200px, 1fr) minmax(0, 2fr); gap: 18px 36px;
       background: var(--card); border: 1px solid var(--hair); border-radius: 14px;
       padding: 20px 24px; box-shadow: var(--shadow); }
.stage, .replies { display: grid; gap: 10px; align-content: start; }
.round { font-size: 3rem; line-height: 1; letter-spacing: -0.04em; font-weight: 640; }
.round span { font-size: 1.1rem; color: var(--soft); letter-spacing: 0; font-weight: 500; }
.count { font-size: 1.1rem; line-height: 1; padding-top: 1.42rem; color: var(--soft); }
.count b { font-size: 1.6rem; color: var(--ink); letter-spacing: -0.02em; font-weight: 640; }
.meter { display: block; width: 100%; height: 8px; border-radius: 99px; overflow: hidden; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { border: 1px dashed var(--other); border-radius: 99px; padding: 2px 11px;
        font-size: 0.86rem; }
.chip a { text-decoration: none; color: var(--soft); }
.chip.done { border: 1px solid transparent; background: var(--good-soft); }
.chip.done a { color: var(--good); font-weight: 560; }

.tiles { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1px;
         background: var(--hair); border: 1px solid var(--hair); border-radius: 14px;
         overflow: hidden; box-shadow: var(--shadow); }
.tile { background: var(--card); padding: 15px 16px 14px; min-width: 0; }
.tile dt { color: var(--soft); font-size: 0.86rem; }
.tile .big { font-size: 1.32rem; font-weight: 640; letter-spacing: -0.025em; line-height: 1.3;
             overflow-wrap: anywhere; }
.tile time { white-space: normal; }
.tile .small { color: var(--soft); font-size: 0.84rem; overflow-wrap: anywhere; }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr));
        gap: 16px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
       gap: 0 24px; align-items: start; }
.two > div { min-width: 0; }
.panel { background: var(--card); border: 1px solid var(--hair); border-radius: 14px;
         padding: 16px 20px 12px; min-width: 0; box-shadow: var(--shadow); }
.panel p { color: var(--soft); font-size: 0.88rem; margin: 0 0 8px; }
.panel.wide { max-width: 640px; }
.spark { width: 120px; height: 32px; display: block; }
.spark .mean-line { stroke-width: 2; }

.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--hair);
          border-radius: 14px; box-shadow: var(--shadow); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap;
         border-top: 1px solid var(--hair); }
thead th { border-top: 0; color: var(--soft); font-weight: 520; font-size: 0.84rem;
           padding-top: 11px; }
tbody th { font-weight: 600; }
tbody tr:hover > * { background: color-mix(in srgb, var(--hair) 45%, var(--card)); }
th:first-child, td:first-child { padding-left: 20px; }
th:last-child, td:last-child { padding-right: 20px; }
.words { text-align: left; }
td.long { max-width: 30em; min-width: 13em; white-space: normal; overflow-wrap: anywhere; }
tbody th .pill { margin-left: 10px; }
.pages { display: flex; gap: 18px; margin-top: 12px; font-size: 0.92rem; }

.events { background: var(--card); border: 1px solid var(--hair); border-radius: 14px;
          box-shadow: var(--shadow); padding: 4px 20px; }
.events li { display: grid; grid-template-columns: 184px minmax(0, 1fr); gap: 4px 16px;
             padding: 9px 0; border-top: 1px solid var(--hair); }
.two .events li { grid-template-columns: minmax(0, 1fr); gap: 0; padding: 8px 0; }
.events li:first-child { border-top: 0; }
.when { color: var(--soft); font-size: 0.88rem; display: flex; gap: 10px; align-items: baseline; }
.kind { font-size: 0.8rem; min-width: 76px; color: var(--soft); font-weight: 560; }
.kind::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%;
                margin-right: 8px; background: var(--other); }
.events .good .kind::before { background: #12936a; }
.events .warn .kind::before { background: var(--event); }
.events .bad .kind::before { background: var(--bad); }
.what { font-weight: 540; overflow-wrap: anywhere; }
.what::first-letter { text-transform: uppercase; }
.why { color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }
.tabs { display: flex; flex-flow: row wrap; gap: 6px; margin-top: 16px; }
.tabs a { display: block; padding: 3px 12px; border-radius: 99px; border: 1px solid var(--faint);
          color: var(--soft); text-decoration: none; font-size: 0.9rem; background: var(--card); }
.tabs a:hover { color: var(--ink); border-color: var(--other); }
.tabs [aria-current] { background: var(--good-soft); color: var(--accent); font-weight: 600;
                       border-color: transparent; }

.mapped { display: grid; grid-template-columns: minmax(0, 2fr) minmax(220px, 1fr); gap: 16px;
          align-items: start; }
.told { position: sticky; top: 20px; min-height: 9em; }
.told p { font-size: 0.95rem; }
.headmap .cell { cursor: pointer; outline: none; text-decoration: none; }
.headmap .cell:hover rect,
.headmap .chosen rect { stroke: var(--ink); stroke-opacity: 0.7;
                                                   stroke-width: 1.6; }
.headmap .cell:focus-visible rect { stroke: var(--ink); stroke-opacity: 1; stroke-width: 3;
                                    stroke-dasharray: none; }
.headmap .worth { font-size: 11px; font-weight: 600; pointer-events: none; }
.headmap .bright { fill: #fff; } .headmap .dark { fill: #000; }
.headmap .tick { font-size: 12px; }
.headmap .cross { pointer-events: none; stroke: var(--soft); }
summary { cursor: pointer; color: var(--accent); font-weight: 560; padding: 4px 0;
          width: fit-content; }
details > .scroll { margin-top: 10px; }

.steps { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 10px; }
.steps li { padding: 4px 14px; border-radius: 99px; font-size: 0.9rem; font-weight: 560;
            border: 1px dashed var(--other); color: var(--soft); }
.steps .over { background: var(--good-soft); color: var(--good); border: 1px solid transparent; }
.steps .now { display: block; background: var(--accent); color: var(--card); box-shadow: none;
              border: 1px solid transparent; padding: 4px 14px; border-radius: 99px; }
section[id^="rollout"] .meter { max-width: 420px; margin-top: 10px; }
.buttons { display: flex; gap: 10px; margin-top: 14px; }
button { font: inherit; font-weight: 580; border: 1px solid transparent; border-radius: 8px;
         min-height: 36px; padding: 6px 16px; background: var(--accent); color: var(--card);
         cursor: pointer; }
button:hover { filter: brightness(1.1); }
button.warn { background: none; color: var(--bad); border-color: currentColor; }
input, select { font: inherit; color: inherit; background: var(--paper); width: 100%;
                border: 1px solid #838b86; border-radius: 8px; padding: 6px 10px;
                min-height: 36px; }
label { display: grid; gap: 4px; font-size: 0.88rem; color: var(--soft); }
label input, label select { color: var(--ink); font-size: 0.95rem; }
.forms form { background: var(--card); border: 1px solid var(--hair); border-radius: 14px;
              padding: 18px 20px; display: grid; gap: 12px; align-content: start;
              box-shadow: var(--shadow); }
.forms button { justify-self: start; }
.forms .note { margin-top: -8px; }
.change summary { padding: 0; }
.change form { display: grid; gap: 8px; padding: 10px 0 4px; min-width: 170px; }
.sign-in { max-width: 480px; margin-top: 24px; display: grid; gap: 10px; padding: 20px 24px; }
.sign-in button { justify-self: start; }
.sign-in .fault { color: var(--bad); font-weight: 560; }
"""

_SMALL = """
@media (min-width: 1160px) {
  .tiles { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
}
@media (max-width: 860px) {
  body { display: block; }
  .side { position: sticky; top: 0; z-index: 2; border-right: 0;
          border-bottom: 1px solid var(--hair); }
  .rail { height: auto; position: static; flex-direction: row; flex-wrap: wrap;
          align-items: center; gap: 8px 12px; padding: 10px 16px 0; }
  .brand { padding: 0; }
  .brand .network::before { content: "/ "; }
  .brand > span { display: flex; gap: 5px; }
  .foot { margin: 0 0 0 auto; display: flex; align-items: center; gap: 14px; padding: 0; }
  .live span:last-child { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; }
  .side nav { order: 3; width: calc(100% + 32px); margin: 0 -16px; }
  .side nav ul { flex-direction: row; overflow-x: auto; padding: 0 10px 8px; scrollbar-width: none;
                 position: relative; }
  .side nav a { padding: 6px 10px; gap: 7px; }
  .side nav .icon { width: 16px; height: 16px; }
  main { padding: 20px 16px 48px; }
  .now { grid-template-columns: minmax(0, 1fr); padding: 18px; }
  .alerts li { grid-template-columns: minmax(0, 1fr); }
  .count { padding-top: 0; }
  .mapped { grid-template-columns: minmax(0, 1fr); }
  .told { position: static; min-height: 6em; }
}
@media (max-width: 560px) {
  section { margin-top: 24px; }
  h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile { padding: 12px 14px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .tile .big { font-size: 1.32rem; }
  .panel { padding: 14px 12px 10px; }
  .mapped .panel { padding: 12px 8px 8px; }
  .mapped .told { padding: 12px 14px; }
  .scroll th:first-child { position: sticky; left: 0; background: var(--card); z-index: 1;
                           padding-left: 14px; border-right: 1px solid var(--hair); }
  th, td { padding: 8px 9px; }
  .scroll th:first-child .pill { font-size: 0; padding: 4px; margin-left: 8px; }
  .events { padding: 2px 14px; }
  .events li { grid-template-columns: minmax(0, 1fr); gap: 2px; }
  svg .tick { font-size: 15px; }
  .headmap .tick { font-size: 16px; }
  .headmap .worth { font-size: 15px; }
  input, select, button { min-height: 42px; font-size: 16px; }
}
@media (prefers-reduced-motion: reduce) {
  * { animation: none !important; transition: none !important; scroll-behavior: auto !important; }
}
@media (forced-colors: active) { .pill, .chip, .steps li { border: 1px solid; } }
"""

STYLE = COLOURS + _TONES + CHARTS + _FRAME + _PARTS + _SMALL
