"""The page that a report stands on: its style, and places for what it says. It opens from disk, without a script."""

from string import Template

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --ground: #fff; --card: #f4f6f9; --line: #d5dbe3;
  --accent: #1b6ca8; --box: #e3eef8; --still: #eceef1 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --ground: #14181e; --card: #1d232b;
  --line: #36404c; --accent: #6fb3e8; --box: #213a52; --still: #2b313a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1280px; padding: 16px; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: .4em 0 }
h2 { font-size: 1.25rem; margin: 2em 0 .4em; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.6em 0 .3em } p { margin: .4em 0; max-width: 75ch } a { color: var(--accent) }
nav { display: flex; flex-wrap: wrap; gap: .2em 1em; font-size: .9rem }
.wide { overflow-x: auto; margin: .6em 0 }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
th, td { padding: .3em .32em; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { font-weight: 600; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); z-index: 1 }
td:first-child { font-weight: 600 }
.words td { text-align: left } .words th { text-align: left }
.formula { font: .85rem/1.6 ui-monospace, monospace; background: var(--card); padding: .5em .8em; border-radius: 6px;
  overflow-x: auto; white-space: pre; margin: .5em 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px }
figure, section { margin: 0; min-width: 0 }
figure.all { grid-column: 1 / -1; overflow-x: auto } .all .plot { min-width: 660px }
figcaption, .note { font-size: .85rem; color: var(--soft) }
.plot { width: 100%; height: auto; display: block }
.strips { display: grid; grid-template-columns: max-content max-content; gap: 3px 10px; align-items: center;
  font-size: .85rem }
.strips img { display: block; height: 44px; image-rendering: pixelated } .strips .true { color: var(--accent) }
.diagram text { fill: var(--ink); font: 13px system-ui, sans-serif }
.diagram .small { font-size: 10px; fill: var(--soft) }
.diagram .part { fill: var(--box); stroke: var(--accent) }
.diagram .frozen { fill: var(--still); stroke: var(--soft); stroke-dasharray: 4 3 }
.diagram .end { fill: none; stroke: var(--soft) } .diagram .arrow { fill: none; stroke: var(--soft); stroke-width: 1.4 }
.diagram .tip { fill: var(--soft) }
@media (max-width: 600px) { body { padding: 10px; font-size: 15px } .strips { grid-template-columns: max-content }
  .strips img { height: auto; width: calc(100vw - 20px); max-width: 360px } th, td { padding: .25em .45em } }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
