@echo off
rem Starts White Tuner on Windows: finds a Python that fits and hands everything to launch.py.
rem No delayed expansion, so that ! in paths and arguments stays what it is.
setlocal EnableExtensions DisableDelayedExpansion
chcp 65001 >nul 2>nul
set "PYTHONUTF8=1"
set "HERE=%~dp0"
set "FITS=import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))"
set "RUN="

rem 1. a Python that came with the folder  2. the py launcher  3. python on the PATH (the Store's stand-in fails the test)
if exist "%HERE%python\python.exe" set RUN="%HERE%python\python.exe"
for %%V in (3.12 3.13 3.11 3.10 3.14) do call :try py -%%V
for %%P in (python python3) do call :try %%P
if not defined RUN goto none

%RUN% "%HERE%launch.py" %*
set "CODE=%ERRORLEVEL%"
goto ended

:try
if defined RUN exit /b 0
%* -c "%FITS%" >nul 2>nul
if "%ERRORLEVEL%"=="0" set "RUN=%*"
exit /b 0

:ended
rem The window of a double click stays open when something went wrong; 130 is a stop that was asked for.
if not "%CODE%"=="0" if not "%CODE%"=="130" if not defined CI pause
exit /b %CODE%

rem Last, since some versions of Windows lose count of what follows a line that is not ASCII.
:none
echo error: White Tuner needs Python 3.10 to 3.14, and none was found
echo   -^> install Python 3.12 from python.org (tick "Add python.exe to PATH") and start again
set "CODE=3"
echo 错误：需要 Python 3.10 至 3.14
echo   -^> 请从 python.org 安装 Python 3.12（勾选 Add python.exe to PATH），然后重新启动
goto ended
