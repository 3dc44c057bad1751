"""The report's style sheet: light and dark, wide and narrow, screen and paper.

Hues are Okabe and Ito's (2008), which stay apart with every kind of colour vision: blue carries
the data, vermilion the prune events.
"""

COLOURS = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f1; --card: #ffffff; --ink: #1d2420; --soft: #57605a; --faint: #dfe0da;
  --hair: #e7e7e1; --accent: #0b5d43; --data: #0072b2; --data-soft: #0072b21f;
  --event: #b84a00; --other: #a9b1ac; --bar-rest: #e9eae5; --gone: 0.22;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121614; --card: #1a1f1c; --ink: #e9ede9; --soft: #a3ada6; --faint: #333b36;
    --hair: #29302c; --accent: #7fd1ae; --data: #62b6ea; --data-soft: #62b6ea26;
    --event: #f29b55; --other: #5f6a64; --bar-rest: #29302c; --gone: 0.35;
  }
}
"""

CHARTS = """
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--ink); font-size: 14px; font-family: inherit; }
svg .tick { fill: var(--soft); font-size: 13px; }
svg .big-tick { fill: var(--soft); font-size: 28px; }
svg .value { font-size: 18px; font-weight: 640; paint-order: stroke; stroke: var(--card);
             stroke-width: 5px; stroke-linejoin: round; }
.rule { stroke: var(--hair); stroke-width: 1; }
.event { stroke: var(--event); stroke-width: 1.5; stroke-dasharray: 4 4; }
.flag { fill: var(--event); }
.farm-line { fill: none; stroke: var(--other); stroke-width: 1.4; stroke-linejoin: round;
             opacity: 0.75; }
.mean-behind { fill: none; stroke: var(--other); stroke-width: 3; stroke-dasharray: 2 6;
               stroke-linecap: round; }
.mean-line { fill: none; stroke: var(--data); stroke-width: 3; stroke-linejoin: round;
             stroke-linecap: round; }
.many .mean-line { stroke-width: 5; }
.many .mean-dot { r: 7px; }
.many .event { stroke-width: 3; stroke-dasharray: 6 7; }
.many .rule { stroke-width: 2; }
.mean-dot, .step-dot { fill: var(--data); stroke: var(--card); stroke-width: 1.5; }
.step { fill: none; stroke: var(--data); stroke-width: 3; stroke-linejoin: round; }
.area { fill: var(--data-soft); }
.bar { fill: var(--data); }
.bar-rest { fill: var(--bar-rest); }
.whisker { stroke: var(--ink); stroke-width: 1.5; opacity: 0.6; }
.head { stroke: var(--ink); stroke-opacity: 0.14; }
.head.gone { fill-opacity: var(--gone); stroke: var(--soft); stroke-opacity: 0.7;
             stroke-dasharray: 3 3; }
.head.unscored { fill: var(--bar-rest); }
.cut-farm { fill: var(--data); fill-opacity: 0.45; stroke: var(--data); }
.cut-farms { stroke: var(--other); stroke-width: 1.5; }
.cut-all { fill: var(--ink); stroke: var(--card); stroke-width: 1; }
.cut-row { fill: transparent; }
.cut-row.gone { fill: var(--bar-rest); }
.cross { stroke: var(--ink); stroke-width: 1.4; stroke-linecap: round; }
"""

STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; }
h1 { font-size: clamp(1.75rem, 4.5vw, 2.6rem); line-height: 1.12; letter-spacing: -0.022em;
     margin: 0 0 14px; overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; line-height: 1.3; margin: 0 0 4px; }
h3 { font-size: 0.95rem; margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0; }
.mark { color: var(--accent); font-weight: 650; font-size: 0.9rem; margin-bottom: 10px;
        display: flex; align-items: center; gap: 8px; }
.mark svg { width: 20px; height: 20px; fill: currentColor; }
.lead { font-size: 1.12rem; color: var(--soft); max-width: 46em; text-wrap: pretty; }
.lead b { color: var(--ink); font-weight: 620; }
.note { color: var(--soft); font-size: 0.92rem; max-width: 52em; margin-bottom: 18px; }
section { margin: 52px 0 0; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin-top: 32px;
           background: var(--faint); border: 1px solid var(--faint); border-radius: 14px;
           overflow: hidden; }
.figures > div { background: var(--card); padding: 20px 22px 18px; }
.figures dt { color: var(--soft); font-size: 0.88rem; }
.figures dd { margin: 0; }
.figures .big { font-size: clamp(1.6rem, 3.2vw, 2.25rem); font-weight: 640; line-height: 1.2;
                letter-spacing: -0.025em; white-space: nowrap; }
.figures .small { color: var(--soft); font-size: 0.86rem; line-height: 1.4; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }
.many { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; }
.pair + .many, .pair + .cuts { margin-top: 20px; }
.cuts { align-items: start; }
.panel { background: var(--card); border: 1px solid var(--hair); border-radius: 14px;
         padding: 18px 20px 14px; margin: 0; break-inside: avoid; min-width: 0; }
.panel p { color: var(--soft); font-size: 0.88rem; margin: -4px 0 10px; }
.many .panel { padding: 12px 14px 8px; }
.many h3, .leaves h3 { display: flex; justify-content: space-between; gap: 8px; }
.last { color: var(--data); white-space: nowrap; }
.species { display: block; color: var(--soft); font-weight: 400; font-size: 0.86rem; }
"""
    + CHARTS
    + """
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--soft); font-size: 0.86rem;
       margin: 0 0 14px; padding: 0; list-style: none; }
.key svg { width: 26px; height: 12px; vertical-align: -1px; margin-right: 6px; }
.dot-probe { fill: var(--card); stroke: var(--soft); stroke-width: 2; }
.dot-local { fill: var(--other); stroke: var(--card); }
.dot-dense { fill: var(--ink); stroke: var(--card); }
.dot-pruned { fill: var(--data); stroke: var(--card); stroke-width: 1.5; }
.span { stroke: var(--other); stroke-width: 2; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--hair);
          border-radius: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; }
caption { text-align: left; padding: 14px 20px 6px; color: var(--soft); font-size: 0.88rem; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap;
         border-top: 1px solid var(--hair); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 0.86rem;
           vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 20px; text-align: left; }
th:last-child, td:last-child { padding-right: 20px; }
tbody th { font-weight: 600; text-align: left; }
th.words, td.words { text-align: left; white-space: normal; min-width: 8em; max-width: 18em;
                     overflow-wrap: break-word; }
td.words { min-width: 14em; }
tr.mean > * { border-top: 2px solid var(--soft); font-weight: 640; }
td.strong { font-weight: 640; }
.gauge { width: 160px; height: 24px; display: block; margin-left: auto; }
.gauge .rule { stroke: var(--faint); }
.ends { display: flex; justify-content: space-between; height: auto; }
tr.mean th { text-transform: capitalize; }
.muted { color: var(--soft); font-weight: 400; }
.leaves { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px; }
.strip { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; margin: 8px 0 6px; }
.strip img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px; display: block;
             background: var(--bar-rest); }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--accent); font-weight: 560; padding: 6px 0; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 4px; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 8px 24px;
         font-size: 0.92rem; margin: 12px 0 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { padding-bottom: 64px; }
@media (max-width: 900px) {
  .figures { grid-template-columns: repeat(2, 1fr); }
  .pair { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 560px) {
  main, header, footer { padding: 0 16px; }
  header { padding-top: 32px; }
  footer { padding-bottom: 40px; }
  section { margin-top: 40px; }
  .figures > div { padding: 14px 16px; }
  .panel { padding: 16px 12px 10px; }
  .many { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  svg .tick { font-size: 15px; }
  table { font-size: 0.88rem; }
  th, td { padding: 8px 6px; }
  th:first-child { padding-left: 14px; position: sticky; left: 0; background: var(--card);
                   border-right: 1px solid var(--hair); }
  th.words { min-width: 6.2em; max-width: 9em; }
  caption { padding: 12px 14px 4px; }
  caption span { display: block; max-width: calc(100vw - 62px); }
  .many h3 { flex-direction: column; gap: 0; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 2px; }
  .facts dd { margin-bottom: 10px; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --faint: #bbb; --hair: #ccc;
          --accent: #0b5d43; --data: #0072b2; --data-soft: #0072b21f; --event: #b84a00;
          --other: #999; --bar-rest: #eee; --gone: 0.22; color-scheme: light; }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main, header, footer { max-width: none; padding: 0; }
  section { margin-top: 24pt; }
  .figures, tr, .strip { break-inside: avoid; }
  h2, .note { break-after: avoid; }
  .scroll { overflow: visible; }
  th, td { padding: 5pt 6pt; }
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  details table { font-size: 7pt; }
  details th, details td { padding: 2pt 3pt; min-width: 0; }
  details::details-content { display: block; content-visibility: visible; }
}
"""
)
