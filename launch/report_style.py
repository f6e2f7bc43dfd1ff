"""Style sheet and script of report.html: light and dark, no font, no library and no network."""

CSS = """
:root{--paper:#faf9f6;--card:#fff;--line:#e8e4dc;--grid:#eeebe4;--ink:#1c1b19;--soft:#5c5850;--faint:#908a7e;
--a:#3b4cca;--b:#d4622a;--c:#0e8a74;--d:#8a4fbf;--e:#b8860b;--good:#1f8a4c;--warn:#b7791f;--bad:#c03434;
--tint:color-mix(in srgb,var(--a) 9%,var(--card));--shadow:0 1px 2px #1c1b190a,0 6px 24px -12px #1c1b1914;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#121214;--card:#1a1a1e;--line:#2b2b31;--grid:#26262c;--ink:#ececf1;
--soft:#b4b4c0;--faint:#81818e;--a:#8f9dff;--b:#ff9a66;--c:#4fd3bb;--d:#c79bff;--e:#e6bf57;--good:#5fd08e;
--warn:#e8b765;
--bad:#ff8080;--tint:color-mix(in srgb,var(--a) 14%,var(--card));--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 -apple-system,BlinkMacSystemFont,"Segoe UI Variable Text",
"Segoe UI",Inter,Roboto,"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif;
font-variant-numeric:tabular-nums;
-webkit-font-smoothing:antialiased;text-rendering:optimizeLegibility}
main{max-width:1080px;margin:0 auto;padding:52px 28px 72px}
code,pre,.mono{font-family:ui-monospace,"SF Mono","Cascadia Code",Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.87em}
header{margin-bottom:34px}
.brand{display:flex;justify-content:space-between;align-items:center;color:var(--faint);font-size:13px;
letter-spacing:.02em;
margin-bottom:30px}
.brand b{color:var(--ink);font-weight:650;letter-spacing:-.01em;font-size:15px;display:inline-flex;align-items:center;
gap:9px}
.brand svg{width:20px;height:20px}
.headline{display:flex;align-items:center;gap:16px;flex-wrap:wrap}
h1{font-size:40px;line-height:1.1;letter-spacing:-.028em;font-weight:680;margin:0;overflow-wrap:anywhere}
.sub{color:var(--soft);margin:12px 0 0;max-width:860px;font-size:16px}
.sub b{font-weight:600;color:var(--ink)}
.pill{display:inline-flex;align-items:center;gap:7px;font-size:13px;font-weight:570;padding:4px 12px 4px 10px;
border-radius:99px;
border:1px solid color-mix(in srgb,currentColor 30%,transparent);
background:color-mix(in srgb,currentColor 8%,transparent);white-space:nowrap}
.pill:before{content:"";width:7px;height:7px;border-radius:50%;background:currentColor}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);border:1px solid var(--line);border-radius:14px;
background:var(--card);
box-shadow:var(--shadow);margin-bottom:22px;overflow:hidden}
.tile{padding:17px 18px 15px;border-left:1px solid var(--line);margin-left:-1px;min-width:0}
.tile .k{color:var(--faint);font-size:12.5px;white-space:nowrap}
.tile .v{font-size:25px;font-weight:640;letter-spacing:-.025em;line-height:1.25;margin-top:3px;white-space:nowrap}
.tile .v small{font-size:13.5px;font-weight:500;color:var(--soft);letter-spacing:0;margin-left:4px}
.tile .n{color:var(--soft);font-size:12.5px;margin-top:2px;line-height:1.4}
section{margin-top:44px}
h2{font-size:20px;letter-spacing:-.015em;font-weight:640;margin:0 0 4px}
.lead{color:var(--soft);margin:0 0 14px;max-width:760px;font-size:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;box-shadow:var(--shadow)}
figure{margin:0;padding:18px 20px 10px;position:relative;min-width:0}
figcaption{display:flex;justify-content:space-between;align-items:baseline;gap:12px;margin-bottom:8px}
figcaption b{font-weight:620;font-size:15px;letter-spacing:-.01em;white-space:nowrap}
figcaption span{color:var(--faint);font-size:12.5px;text-align:right}
figcaption span i{font-style:normal;color:var(--ink);font-weight:560}
.legend{display:flex;gap:16px;flex-wrap:wrap;color:var(--soft);font-size:12.5px;align-items:center}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;
background:currentColor}
.legend i.round{width:8px;height:8px;border-radius:50%}
.legend i.tri{width:0;height:0;border-radius:0;background:none;border:4.5px solid transparent;
border-bottom:8px solid currentColor;border-top:0}
.legend span{color:var(--soft);text-align:left}.legend .a i{color:var(--a)}.legend .b i{color:var(--b)}
.legend .c i{color:var(--c)}.legend .d i{color:var(--d)}.legend .e i{color:var(--e)}
.legend .bad{color:var(--soft)}.legend .bad i{color:var(--bad)}
.grid2{display:grid;grid-template-columns:1fr 1fr;gap:18px;margin-top:18px}
.switch{display:inline-flex;border:1px solid var(--line);border-radius:8px;overflow:hidden;font-size:12px}
.switch label{padding:2px 10px;cursor:pointer;color:var(--soft)}
.switch input{position:absolute;opacity:0;pointer-events:none}
.switch label:has(input:checked){background:var(--tint);color:var(--a);font-weight:570}
.switch label:has(input:focus-visible){outline:2px solid var(--a);outline-offset:-2px}
figure .log{display:none}
figure:has(input[value=log]:checked) .log{display:block}
figure:has(input[value=log]:checked) .linear{display:none}
svg.chart{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
.narrow{display:none}
.chart .grid{stroke:var(--grid)}
.chart .tick,.chart .span-label{fill:var(--faint);font-size:11px}
.chart .span-label{fill:var(--soft);font-size:11.5px}
.chart path{fill:none}
.chart .line{stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.chart .raw{stroke-width:1;opacity:.3;stroke-linejoin:round}
.chart .a{stroke:var(--a)}.chart .b{stroke:var(--b)}.chart .c{stroke:var(--c)}.chart .d{stroke:var(--d)}
.chart .e{stroke:var(--e)}
.chart .fill,.chart .band{stroke:none;opacity:.12}.chart .band{opacity:.2}
.chart .fill.a,.chart .band.a,.chart .span.a{fill:var(--a)}.chart .fill.b,.chart .band.b,.chart .span.b{fill:var(--b)}
.chart .fill.c,.chart .band.c,.chart .span.c{fill:var(--c)}.chart .fill.d,.chart .band.d,.chart .span.d{fill:var(--d)}
.chart .fill.e,.chart .band.e,.chart .span.e{fill:var(--e)}
.chart .span{stroke:none;opacity:.75}
.chart .dot{fill:var(--card);stroke-width:1.8}.chart .thin{stroke-width:1.1}.chart .dot.thin{stroke-width:1.3}
.chart .mark{stroke:var(--faint);stroke-dasharray:2 4}
.chart .event{fill:var(--bad)}
.chart .cross{stroke:var(--faint);stroke-width:1;pointer-events:none}
.chart .here{stroke:var(--card);stroke-width:2;pointer-events:none}
.chart .here.a{fill:var(--a)}.chart .here.b{fill:var(--b)}.chart .here.c{fill:var(--c)}.chart .here.d{fill:var(--d)}
.chart .here.e{fill:var(--e)}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--paper);border-radius:9px;
padding:7px 11px 8px;
font-size:12.5px;line-height:1.5;opacity:0;transition:opacity .12s;box-shadow:0 6px 24px #0003;white-space:nowrap}
#tip b{font-weight:600}#tip div{display:flex;justify-content:space-between;gap:16px}#tip div span{opacity:.7}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--faint);font-weight:500;font-size:12.5px;padding:11px 16px 8px;
border-bottom:1px solid var(--line);white-space:nowrap}
td{padding:9px 16px;border-bottom:1px solid var(--grid);vertical-align:top}
tr:last-child td{border-bottom:0}
.num{text-align:right;white-space:nowrap}.nowrap{white-space:nowrap}
.muted{color:var(--faint)}
.chip{display:inline-block;padding:0 7px;border-radius:6px;background:var(--tint);color:var(--a);font-size:12.5px;
margin:1px 4px 1px 0}
.old{color:var(--faint);text-decoration:line-through;text-decoration-thickness:1px}
.share{height:5px;border-radius:3px;background:var(--grid);overflow:hidden;margin-top:6px;min-width:90px}
.share i{display:block;height:100%;background:var(--a);border-radius:3px}
.notes{margin:0;padding:14px 20px;list-style:none;font-size:14px}
.notes li{padding:5px 0 5px 20px;position:relative}
.notes li:before{content:"";position:absolute;left:2px;top:13px;width:7px;height:7px;border-radius:50%;
background:var(--faint)}
.notes li.good,.notes li.warn,.notes li.bad{color:inherit}
.notes li.good:before{background:var(--good)}.notes li.warn:before{background:var(--warn)}
.notes li.bad:before{background:var(--bad)}
pre.sample{margin:0;padding:20px 24px;overflow-x:auto;line-height:1.6;font-size:13px;white-space:pre-wrap;
overflow-wrap:anywhere}
details{border-bottom:1px solid var(--line)}details:last-child{border:0}
summary{cursor:pointer;padding:13px 20px;font-weight:580;list-style:none;display:flex;align-items:baseline;gap:10px}
summary::-webkit-details-marker{display:none}
summary:before{content:"";width:6px;height:6px;border:solid var(--faint);border-width:0 1.6px 1.6px 0;
transform:rotate(-45deg) translateY(-2px);
transition:transform .12s;flex:none}
details[open]>summary:before{transform:rotate(45deg) translateX(-1px)}
summary span{font-weight:400;color:var(--faint);font-size:13px;margin-left:auto;text-align:right}
.keys{columns:2;column-gap:44px;padding:2px 20px 16px 36px;font-size:13px}
.keys div{display:flex;justify-content:space-between;gap:14px;break-inside:avoid;padding:2.5px 0;
border-bottom:1px solid var(--grid)}
.keys span{color:var(--soft)}.keys b{font-weight:500;text-align:right;overflow-wrap:anywhere}
.keys .set span,.keys .set b{color:var(--a);font-weight:570}
footer{margin-top:52px;color:var(--faint);font-size:12.5px;line-height:1.65;max-width:820px}
@media(max-width:900px){.tiles{grid-template-columns:repeat(3,1fr)}
.tile:nth-child(n+4){border-top:1px solid var(--line)}}
@media(max-width:680px){main{padding:28px 16px 48px}h1{font-size:30px}.grid2{grid-template-columns:minmax(0,1fr)}
.keys{columns:1}
.tiles{grid-template-columns:1fr 1fr}.tile:nth-child(n+3){border-top:1px solid var(--line)}
.wide{display:none!important}.narrow{display:block}
figure{padding:14px 12px 8px}figcaption{flex-wrap:wrap}.switch{display:none}}
@media print{body{background:#fff}.card,.tiles{box-shadow:none;break-inside:avoid}.card:has(details){break-inside:auto}
h2,.lead,summary{break-after:avoid}details::details-content{content-visibility:visible}.switch{display:none}
.scroll{overflow:visible}table{font-size:11px}th,td{padding:6px 8px}.nowrap,.num{white-space:normal}}
"""

SCRIPT = """
(() => {
const tip = document.getElementById('tip'), NS = 'http://www.w3.org/2000/svg';
const charts = [...document.querySelectorAll('svg.chart')].map(svg => ({svg, ...JSON.parse(svg.dataset.chart)}));
const share = (lo, hi, v, log) => log ? Math.log(v / lo) / Math.log(hi / lo) : (v - lo) / ((hi - lo) || 1);
const place = ([lo, hi, a, b, log], v) => a + share(lo, hi, v, log) * (b - a);
const value = ([lo, hi, a, b, log], p) => { const t = (p - a) / (b - a);
  return log ? lo * (hi / lo) ** t : lo + t * (hi - lo); };
const near = (xs, x) => { let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; xs[m] <= x ? a = m : b = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b; };
const node = (svg, name, attributes) => { const n = document.createElementNS(NS, name);
  for (const k in attributes) n.setAttribute(k, attributes[k]); svg.append(n); };
const clear = () => document.querySelectorAll('.cross,.here').forEach(n => n.remove());
const show = step => { clear(); for (const c of charts) {
  if (!c.svg.clientWidth) continue;
  const x = place(c.x, Math.min(Math.max(step, c.x[0]), c.x[1]));
  node(c.svg, 'line', {class: 'cross', x1: x, x2: x, y1: c.y[3], y2: c.y[2]});
  for (const s of c.s) { const i = near(s.x, step), y = s.y[i] == null ? NaN : place(c.y, s.y[i]);
    if (y >= c.y[3] - 3 && y <= c.y[2] + 3)
      node(c.svg, 'circle', {class: 'here ' + s.c, cx: place(c.x, s.x[i]), cy: y, r: 4}); } } };
const text = (tag, words) => { const n = document.createElement(tag); n.textContent = words; return n; };
for (const c of charts) {
  c.svg.addEventListener('pointermove', e => {
    const box = c.svg.getBoundingClientRect(), p = (e.clientX - box.left) / box.width * c.w;
    const raw = value(c.x, Math.min(Math.max(p, c.x[2]), c.x[3])), step = c.s[0].x[near(c.s[0].x, raw)];
    show(step); tip.replaceChildren(text('b', 'step ' + step.toLocaleString('en')));
    for (const s of c.s) { const i = near(s.x, step), row = document.createElement('div');
      const at = s.x[i] === step ? '' : ' at ' + s.x[i].toLocaleString('en');
      row.append(text('span', s.n + at), text('b', s.t[i])); tip.append(row); }
    const left = e.clientX + 18 + tip.offsetWidth > innerWidth ? e.clientX - 18 - tip.offsetWidth : e.clientX + 18;
    tip.style.left = Math.max(4, left) + 'px';
    tip.style.top = Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 8) + 'px';
    tip.style.opacity = 1; });
  c.svg.addEventListener('pointerleave', () => { clear(); tip.style.opacity = 0; });
}
})();
"""

LOGO = """<svg viewBox="0 0 20 20" fill="none" aria-hidden="true"><path d="M2 4.5c3.2 0 3.2 9.5 6.8 9.5S14 15.5 18 15.5"
stroke="var(--a)" stroke-width="2.4" stroke-linecap="round"/><circle cx="15.2" cy="6" r="2.6" fill="var(--b)"/></svg>"""
